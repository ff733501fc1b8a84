"""The whole trainer on a GPU against the CPU's golden losses, and the command around it (``make gpu``).

Float32 means float32: ``conftest.py`` keeps cuBLAS from TF32, which Transformer Engine asks it for.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import DOCUMENTS, ENGINE_MODELS, GOLDEN_MODELS, golden_file, run_config
from integration_runs import ROOT, SMALL, final, losses, torchrun, weights
from training_runs import resume, train, train_and_save

from mesh_megatron.config.run import RunConfig
from mesh_megatron.parallel.groups import stop_model_parallel
from mesh_megatron.platform import device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not device.has_gpu(), reason="needs a GPU")]

needs_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)
IMPLEMENTATIONS = ["local", pytest.param("transformer_engine", marks=needs_engine)]
FP8_SIZES = "--bf16 --hidden-size 128 --seq-length 64 --micro-batch-size 4"


@pytest.fixture(scope="module", autouse=True)
def process_group():
    device.start_process_group()
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def state_of_one_test():
    yield
    stop_model_parallel()
    if "transformer_engine.pytorch" in sys.modules:
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()


def with_layers(run: RunConfig, implementation: str) -> RunConfig:
    return replace(run, parallel=replace(run.parallel, transformer_impl=implementation))


def golden_losses(name: str) -> np.ndarray:
    return np.loadtxt(golden_file(name))[:, 1]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, "local") for name in GOLDEN_MODELS),
        *(pytest.param(name, "transformer_engine", marks=needs_engine) for name in ENGINE_MODELS),
    ],
)
def test_float32_trains_as_on_a_cpu(name: str, implementation: str) -> None:
    expected = golden_losses(name)
    record = train(with_layers(run_config(GOLDEN_MODELS[name]), implementation))
    np.testing.assert_allclose(record.losses, expected, rtol=0, atol=5e-4)
    others = [golden_losses(other) for other in GOLDEN_MODELS]
    told_apart = [losses for losses in others if np.abs(losses - expected).max() > 1e-3]  # 2 pairs differ by 1e-4
    nearest = min(np.abs(record.losses - losses).max() for losses in told_apart)
    assert np.abs(record.losses - expected).max() < nearest / 3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["base", "mesh", "gated"])
def test_bfloat16_trains_within_its_noise(name: str, implementation: str) -> None:
    record = train(with_layers(run_config(f"{GOLDEN_MODELS[name]} --bf16"), implementation))
    np.testing.assert_allclose(record.losses, golden_losses(name), rtol=0, atol=5e-3)


@pytest.mark.parametrize("kernel", ["torch", "slots"])
def test_every_memory_kernel_trains_alike(kernel: str) -> None:
    record = train(run_config(f"--memory-kernel {kernel}"))
    np.testing.assert_allclose(record.losses, golden_losses("mesh"), rtol=0, atol=5e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_checkpoint_continues_the_same_run(implementation: str, tmp_path: Path) -> None:
    run = with_layers(run_config(layout=f"--save {tmp_path} --use-distributed-optimizer --bf16"), implementation)
    whole = train(run).losses
    stop_model_parallel()
    first = train_and_save(run, 5)
    stop_model_parallel()
    rest = resume(run, final(tmp_path))
    np.testing.assert_allclose([*first, *rest], whole, rtol=0, atol=1e-5)


@needs_engine
@pytest.mark.parametrize(("flags", "tolerance"), [("", 1e-4), ("--bf16", 8e-2)])
@pytest.mark.parametrize("name", ["mesh", "gated"])
def test_all_loops_add_to_the_gradients(name: str, flags: str, tolerance: float) -> None:
    """Gradients of the first step, where Transformer Engine lets a module's first call overwrite other calls' sums."""
    run = run_config(f"{GOLDEN_MODELS[name]} {flags}")
    gradients = [one_step_gradients(with_layers(run, impl)) for impl in ("local", "transformer_engine")]
    assert_close(*gradients, tolerance)


@needs_engine
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_fp8_trains_within_its_noise(recipe: str) -> None:
    plain, eight = run_config(FP8_SIZES), run_config(f"{FP8_SIZES} --fp8-format hybrid --fp8-recipe {recipe}")
    assert_close(one_step_gradients(plain), one_step_gradients(eight), tolerance=0.3)
    losses_in_bf16 = train(plain).losses
    stop_model_parallel()
    np.testing.assert_allclose(train(eight).losses, losses_in_bf16, rtol=0, atol=1e-1)


def one_step_gradients(run: RunConfig) -> dict[str, np.ndarray]:
    record = train(replace(run, training=replace(run.training, train_iters=1)), with_gradients=True)
    stop_model_parallel()
    return record.gradients


def assert_close(expected: dict[str, np.ndarray], gradients: dict[str, np.ndarray], tolerance: float) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = np.linalg.norm(gradient - expected[name])
        assert error <= tolerance * np.linalg.norm(expected[name]) + 1e-6, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_documents_do_not_see_each_other(implementation: str) -> None:
    """Every implementation masks alike, and the mask matters."""
    masked = train(with_layers(run_config(DOCUMENTS), implementation)).losses
    stop_model_parallel()
    np.testing.assert_allclose(masked, train(with_layers(run_config(DOCUMENTS), "local")).losses, rtol=0, atol=2e-3)
    assert abs(masked[0] - golden_losses("mesh")[0]) > 1e-3


def test_the_command_saves_behind_training_profiles_and_exports(corpus: str, tmp_path: Path) -> None:
    save = tmp_path / "run"
    flags = ["--data-path", corpus, "--save", save, "--save-interval", "4", "--async-save", "--bf16"]
    profile = ["--profile", "--profile-step-start", "2", "--profile-step-end", "4"]
    done = torchrun(1, "pretrain_mesh.py", *SMALL, *flags, *profile, "--train-iters", "8")
    assert done.returncode == 0, done.stderr
    assert sorted(losses(save)) == list(range(1, 9))
    trace = json.loads((save / "profile" / "rank0.json").read_text())
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
    assert weights(final(save))
    export = [sys.executable, "tools/export_hf.py", "--load", str(save), "--output", str(tmp_path / "hf")]
    exported = subprocess.run(export, cwd=ROOT, capture_output=True, text=True)
    assert exported.returncode == 0, exported.stderr


def test_deterministic_runs_are_the_same_to_the_bit() -> None:
    device.add_in_fixed_order()
    try:
        run = run_config("--bf16 --deterministic-mode --hidden-size 128 --seq-length 1024")
        once = train(run)
        stop_model_parallel()
        assert train(run).losses == once.losses
    finally:
        torch.use_deterministic_algorithms(False)
