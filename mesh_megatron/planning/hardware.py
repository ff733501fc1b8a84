"""Hardware model for predicted times: data sheets of GPUs (``gpus.yaml``), assumed efficiencies, links."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated

import yaml

from mesh_megatron.config.bounds import Bounds
from mesh_megatron.config.cli import from_dict


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Dense peaks from the manufacturer's data sheet; bandwidths in GB/s, for links in one direction."""

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
    """Return every GPU of ``gpus.yaml`` by its short name."""
    text = files("mesh_megatron.planning").joinpath("gpus.yaml").read_text(encoding="utf-8")
    empty = Gpu(name="", memory_gb=0, bf16_tflops=0, fp8_tflops=None, fp32_tflops=0, memory_gb_s=0, nvlink_gb_s=0,
                network_gb_s=0, source="")  # fmt: skip
    return {name: from_dict(Gpu, row, f"gpus.yaml: {name}", empty) for name, row in yaml.safe_load(text).items()}


def gpu_named(name: str) -> Gpu:
    """Return the GPU with this short name; raise ``ValueError`` listing all names if there is none."""
    gpus = known_gpus()
    if name not in gpus:
        raise ValueError(
            f"--gpu {name}: the table has {', '.join(gpus)}; add a row to mesh_megatron/planning/gpus.yaml"
        )
    return gpus[name]


Share = Annotated[float, Bounds(above=0, most=1)]


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Assumptions of predicted times: achieved shares of the data sheet's peaks, and latencies."""

    matmul_efficiency: Share = 0.65
    """Achieved share of the peak in bfloat16 or float32 matrix products; assumed."""
    fp8_matmul_efficiency: Share = 0.5
    """Achieved share of the FP8 peak in FP8 matrix products, including casts and scales; assumed."""
    attention_efficiency: Share = 0.35
    """Achieved share of the bfloat16 peak in attention. The abstract of FlashAttention-3 (arXiv 2407.08608) reports
    this value for FlashAttention-2 on an H100; on an A100 it is 0.5 to 0.73 (arXiv 2307.08691)."""
    memory_efficiency: Share = 0.8
    """Achieved share of memory bandwidth in norms, activations, sums, loss and optimizer; assumed."""
    link_efficiency: Share = 0.8
    """Achieved share of a link's bandwidth in messages; assumed."""
    nvlink_latency_us: Annotated[float, Bounds(least=0)] = 3.4
    """Microseconds per step of a ring collective, or per hop, inside a node; from NCCL's tuning table
    (src/graph/tuning.cc, ring, Simple)."""
    network_latency_us: Annotated[float, Bounds(least=0)] = 14.0
    """The same between nodes, from the same table."""
    layer_launch_us: Annotated[float, Bounds(least=0)] = 300.0
    """Microseconds that the CPU takes to launch a layer's kernels, forward or backward: a minimum; assumed."""


@dataclass(frozen=True)
class Links:
    """Predicted times of messages; ranks fill nodes in Megatron-Core's order (tensor, context, data, pipeline)."""

    gpu: Gpu
    assumptions: Assumptions
    gpus_per_node: int

    def collective(self, bytes_sent: float, ranks: int, stride: int, rounds: int = 1) -> float:
        """Return the seconds of a ring collective over ranks that are ``stride`` apart; each sends ``bytes_sent``.

        ``rounds`` is 1 for all-gather, reduce-scatter and all-to-all, and 2 for all-reduce. If several ranks of a node
        take part, the ring uses all their network adapters at once, as NCCL's rings do.
        """
        if ranks == 1:
            return 0.0
        together = min(ranks, max(1, self.gpus_per_node // stride))
        nodes = -(-ranks // together)
        bandwidth = self.gpu.nvlink_gb_s
        if nodes > 1:
            bandwidth = min(bandwidth, self.gpu.network_gb_s * together)
        between = nodes - 1
        steps = (ranks - 1 - between) * self.assumptions.nvlink_latency_us
        steps += between * self.assumptions.network_latency_us
        return bytes_sent / (bandwidth * 1e9 * self.assumptions.link_efficiency) + rounds * steps * 1e-6

    def hop(self, size: int, inside: bool) -> float:
        """Return the seconds of one ``size``-byte message along the ring, ``inside`` a node or between nodes."""
        bandwidth = self.gpu.nvlink_gb_s if inside else self.gpu.network_gb_s
        latency = self.assumptions.nvlink_latency_us if inside else self.assumptions.network_latency_us
        return size / (bandwidth * 1e9 * self.assumptions.link_efficiency) + latency * 1e-6

    def hop_is_inside(self, stage: int, ring: int, world_size: int) -> bool:
        """Return whether all ranks of pipeline stage ``stage`` are on the same node as their successors on the ring."""
        size = world_size // ring
        here, there = stage * size, (stage + 1) % ring * size
        return all((here + i) // self.gpus_per_node == (there + i) // self.gpus_per_node for i in range(size))
