"""The name "cuda" answers for the CPU, and torch itself still knows better."""

import subprocess
import sys

import pytest
import torch

from mesh_megatron.platform import device


@pytest.fixture(autouse=True)
def prepared():
    device.prepare()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, 3, device="cuda"),
        lambda: torch.randn(4, device=torch.cuda.current_device()),
        lambda: torch.empty_strided((2, 3), (3, 1), device="cuda:0"),
        lambda: torch.tensor([1.0], device="cuda", pin_memory=True),
        lambda: torch.ones(2).to("cuda"),
        lambda: torch.ones(2).to(device=torch.device("cuda", 0), dtype=torch.bfloat16),
        lambda: torch.ones(2).cuda(),
        lambda: torch.ones(2).new_tensor([1], device="cuda"),
        lambda: torch.nn.Linear(2, 2, device="cuda").to("cuda").cuda().weight,
    ],
)
def test_tensors_land_on_the_cpu(make):
    assert make().device.type == "cpu"


def test_torch_is_not_deceived():
    assert not torch.cuda.is_available()
    assert not torch.zeros(1, device="cuda").is_cuda
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1).to("xpu")


def test_device_contexts_go_on_working():
    """Transformers loads models under one, and takes tensors that are not on it for initialised."""
    with torch.device("meta"):
        for made in (torch.tensor([1.0]), torch.as_tensor([1.0]), torch.arange(2), torch.nn.Linear(2, 2).weight):
            assert made.device.type == "meta"


def test_runtime_answers():
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(torch.cuda.Stream()):
        start.record()
        end.record()
    assert start.elapsed_time(end) >= 0
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor" == torch.zeros(1).type()
    assert torch.zeros(1).type() != "torch.cuda.HalfTensor"


def test_the_device_generator_is_the_cpus():
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(2, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(2))


def test_megatron_core_before_the_platform_is_refused():
    code = (
        "import warnings; warnings.simplefilter('ignore')\nimport megatron.core\n"
        "from mesh_megatron.platform import device\ndevice.prepare()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "before megatron.core is imported" in result.stderr


def test_packages_of_a_gpu_are_not_used(tmp_path):
    """They may be installed where the GPU is hidden, or not there."""
    for name in ("transformer_engine", "apex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('no GPU')")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from mesh_megatron.platform import device\n"
        "device.prepare()\n"
        "import torch, megatron.core.optimizer as optimizer\n"
        "assert optimizer.Adam is torch.optim.AdamW"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
