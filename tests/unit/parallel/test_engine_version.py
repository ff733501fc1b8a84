"""Transformer Engine must go with Megatron-Core: what is pinned does, and what does not is named at start."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.platform import device

ROOT = Path(__file__).parents[3]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@pytest.fixture(autouse=True)
def prepared() -> None:
    device.prepare()


def pinned(file: str, package: str, python: str) -> str:
    """The version of ``package`` that ``requirements/file`` installs under ``python``."""
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    found = [Requirement(line) for line in lines if line.startswith(package)]
    [version] = [
        str(requirement.specifier).removeprefix("==")
        for requirement in found
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python})
    ]
    return version


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_pinned_goes_together_and_is_documented(python):
    from mesh_megatron.parallel.engine_version import mismatch

    core, engine = pinned("runtime.txt", "megatron-core", python), pinned("te.txt", "transformer-engine", python)
    assert mismatch(core, engine) is None
    torch = pinned("runtime.txt", "torch==", python)
    table = (ROOT / "docs/training.md").read_text().split("## Versions")[1].split("##")[0]
    [row] = [line for line in table.splitlines() if line.startswith("| 3.") and python in line]
    assert all(version in row for version in (core, engine, torch))


@pytest.mark.parametrize(
    ("core", "engine", "fits"),
    [
        ("0.16.1", "2.9.0", True),
        ("0.16.1", "2.11.0+c188b53", True),
        ("0.16.1", "2.12.0", False),
        ("0.16.1", "2.8.0", False),
        ("0.19.2", "2.20.2", True),
        ("0.19.2", "2.21.0", False),
        ("0.20.0", "2.21.0", True),  # not known to be wrong
    ],
)
def test_pairs(core, engine, fits):
    from mesh_megatron.parallel.engine_version import mismatch

    reason = mismatch(core, engine)
    assert (reason is None) == fits
    assert fits or (engine in reason and core in reason and "mesh-megatron[te]" in reason)


def test_an_engine_that_does_not_fit_is_refused_or_left_out(monkeypatch):
    from mesh_megatron.parallel import build_model, engine_version

    monkeypatch.setattr(engine_version.metadata, "version", lambda name: "1.2.3")
    monkeypatch.setattr(build_model.device, "has_gpu", lambda: True)
    asked = RunConfig(parallel=ParallelConfig(transformer_impl="transformer_engine"))
    with pytest.raises(ValueError, match="--transformer-impl transformer_engine: Transformer Engine 1.2.3 does not go"):
        build_model.resolve_implementation(asked)
    with pytest.warns(UserWarning, match="Transformer Engine 1.2.3 does not go with megatron-core"):
        tensor_parallel = RunConfig(parallel=ParallelConfig(tensor_model_parallel_size=2))
        assert build_model.resolve_implementation(tensor_parallel) == "local"


def test_no_engine_is_no_mismatch(monkeypatch):
    from mesh_megatron.parallel import engine_version

    def absent(name: str) -> str:
        raise engine_version.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(engine_version.metadata, "version", absent)
    assert engine_version.engine_mismatch() is None
