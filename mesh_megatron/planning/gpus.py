"""The table of GPUs, ``gpus.yaml``: what their data sheets say."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import yaml

from mesh_megatron.config.cli import from_dict


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peaks as the maker gives them, dense; bandwidths in GB/s, of links in one direction."""

    name: str
    memory_gb: float
    bf16_tflops: float
    fp8_tflops: float | None
    fp32_tflops: float
    memory_gb_s: float
    nvlink_gb_s: float
    network_gb_s: float
    source: str


def known_gpus() -> dict[str, Gpu]:
    """Every GPU of the table by its short name."""
    text = files("mesh_megatron.planning").joinpath("gpus.yaml").read_text(encoding="utf-8")
    empty = Gpu(name="", memory_gb=0, bf16_tflops=0, fp8_tflops=None, fp32_tflops=0, memory_gb_s=0, nvlink_gb_s=0,
                network_gb_s=0, source="")  # fmt: skip
    return {name: from_dict(Gpu, row, f"gpus.yaml: {name}", empty) for name, row in yaml.safe_load(text).items()}


def gpu_named(name: str) -> Gpu:
    """``ValueError`` where the table has no such row."""
    gpus = known_gpus()
    if name not in gpus:
        raise ValueError(f"--gpu {name}: the table has {', '.join(gpus)}; add a row to planning/gpus.yaml")
    return gpus[name]
