"""Settings that must precede the import of the first test module, and a small real corpus."""

import os
import signal
from collections.abc import Iterator

# The suite holds ranks of this machine's CPU to each other, also where there is a GPU; what tests the GPU is a run of
# its own (make gpu).
if os.environ.get("GPU_TESTS") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # what is called float32 is

# A shell that starts the suite in the background has it ignore SIGINT, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

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
    """Run the longest files first: workers take complete files, and none should be left with a long one at the end."""
    items.sort(key=lambda item: item.path.parent.name not in ("slurm", "survival"))


@pytest.fixture(scope="session", autouse=True)
def home_of_proofs(tmp_path_factory) -> Iterator[None]:
    """Keep each user's files for one test session only, shared by its workers."""
    shared = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str((shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "home"))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """Prefix of a .bin/.idx of some standard-library source as bytes."""
    return small_corpus(tmp_path_factory.mktemp("corpus"))
