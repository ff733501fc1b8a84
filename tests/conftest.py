"""What must be settled before the first test module is imported, and a small real corpus."""

import os
from pathlib import Path

import pytest
import torch
from integration_runs import small_corpus

if not torch.cuda.is_available():
    # Triton decides once, when it is first imported, whether its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

# Some test modules import megatron.core as they are collected, and the CPU platform must come before it.
from mesh_megatron.platform import device  # noqa: E402

device.prepare()


RANKS = ("distributed", "survival", "slurm")  # folders whose tests start several processes each


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For ``-n 2 --dist loadgroup``: files stay whole, and tests that start ranks run one after the other."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        item.add_marker(pytest.mark.xdist_group("ranks" if folder in RANKS else str(item.path)))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """Prefix of a .bin/.idx of some standard-library source as bytes."""
    return small_corpus(tmp_path_factory.mktemp("corpus"))
