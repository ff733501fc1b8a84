"""What must be settled before the first test module is imported, and a small real corpus."""

import os

# The suite holds ranks of this machine's CPU to each other, also where there is a GPU; what tests the GPU is a run of
# its own (make gpu).
if os.environ.get("GPU_TESTS") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # what is called float32 is

import pytest  # noqa: E402
import torch  # noqa: E402
from integration_runs import small_corpus  # noqa: E402

if not torch.cuda.is_available():
    # Triton decides once, when it is first imported, whether its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

# Some test modules import megatron.core as they are collected, and the CPU platform must come before it.
from mesh_megatron.platform import device  # noqa: E402

device.prepare()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that of the workers, which take whole files, none is left with one at the end."""
    items.sort(key=lambda item: item.path.parent.name not in ("slurm", "survival"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """Prefix of a .bin/.idx of some standard-library source as bytes."""
    return small_corpus(tmp_path_factory.mktemp("corpus"))
