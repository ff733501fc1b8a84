"""FP8 is refused where the device or the software lacks something: flag, value and fix."""

from __future__ import annotations

import pytest

from mesh_megatron.config.fp8 import Fp8Config
from mesh_megatron.config.run import RunConfig
from mesh_megatron.parallel import fp8_support
from mesh_megatron.parallel.fp8_support import check_fp8
from mesh_megatron.platform import device


def run(recipe: str = "tensorwise", fp8_format: str | None = "hybrid") -> RunConfig:
    return RunConfig(fp8=Fp8Config(fp8_format=fp8_format, fp8_recipe=recipe))  # type: ignore[arg-type]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with a GPU of this capability."""

    def pretend(capability=(9, 0), cuda=(12, 9), engine=True, engine_version=True) -> None:
        monkeypatch.setattr(device, "has_gpu", lambda: True)
        monkeypatch.setattr(device, "device_name", lambda: "a GPU")
        monkeypatch.setattr(device, "compute_capability", lambda: capability)
        monkeypatch.setattr(device, "cuda_version", lambda: cuda)
        implementation = "transformer_engine" if engine else "local"
        monkeypatch.setattr(fp8_support, "resolve_implementation", lambda name: implementation)
        monkeypatch.setattr(fp8_support, "is_te_min_version", lambda version: engine_version)

    return pretend


def test_no_gpu() -> None:
    with pytest.raises(ValueError, match="--fp8-format hybrid needs a GPU and there is none: drop it"):
        check_fp8(run())
    check_fp8(run(fp8_format=None))


BAD = [
    ("tensorwise", {"engine": False}, "pip install 'mesh-megatron\\[te\\]' or drop the flag"),
    ("tensorwise", {"capability": (8, 0)}, "--fp8-recipe tensorwise needs compute capability 8.9; a GPU has 8.0: drop"),
    ("blockwise", {"capability": (8, 9)}, "--fp8-recipe blockwise needs compute capability 9.0; .*: use .* tensorwise"),
    ("blockwise", {"cuda": (12, 8)}, "--fp8-recipe blockwise needs CUDA 12.9 or newer"),
    ("mxfp8", {}, "--fp8-recipe mxfp8 needs compute capability 10.0; a GPU has 9.0: use --fp8-recipe tensorwise"),
    ("mxfp8", {"capability": (12, 0)}, "--fp8-recipe mxfp8 lacks matrix products on compute capability 12.0"),
    ("tensorwise", {"engine_version": False}, "needs Transformer Engine 2.2.0 or newer"),
]


@pytest.mark.parametrize(("recipe", "lacking", "message"), BAD)
def test_lacking(recipe: str, lacking: dict, message: str, machine) -> None:
    machine(**lacking)
    with pytest.raises(ValueError, match=message):
        check_fp8(run(recipe))


@pytest.mark.parametrize(
    ("recipe", "capability"),
    [("tensorwise", (8, 9)), ("delayed", (9, 0)), ("blockwise", (9, 0)), ("mxfp8", (10, 0))],
)
def test_enough(recipe: str, capability: tuple[int, int], machine) -> None:
    machine(capability=capability)
    check_fp8(run(recipe))
