"""What a time is predicted from beside data sheets: shares of peaks that are reached, and latencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mesh_megatron.config.bounds import Bounds

Share = Annotated[float, Bounds(above=0, most=1)]


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Assumptions of predicted times: shares of the data sheet's peaks that are reached, and latencies."""

    matmul_efficiency: Share = 0.65
    """Matrix products in bfloat16 or float32, of the peak; assumed."""
    fp8_matmul_efficiency: Share = 0.5
    """Matrix products in FP8 with casts and scales, of the FP8 peak; assumed."""
    attention_efficiency: Share = 0.35
    """Attention, of the bfloat16 peak: what the abstract of FlashAttention-3 (arXiv 2407.08608) says FlashAttention-2
    reaches on an H100; on an A100 it is 0.5 to 0.73 (arXiv 2307.08691)."""
    memory_efficiency: Share = 0.8
    """Norms, activations, sums, loss and optimizer, of the memory's bandwidth; assumed."""
    link_efficiency: Share = 0.8
    """Messages, of a link's bandwidth; assumed."""
    nvlink_latency_us: Annotated[float, Bounds(least=0)] = 3.4
    """One step of a ring collective or one hop inside a node: NCCL's own tuning table (src/graph/tuning.cc, ring,
    Simple)."""
    network_latency_us: Annotated[float, Bounds(least=0)] = 14.0
    """The same between nodes, from the same table."""
    layer_launch_us: Annotated[float, Bounds(least=0)] = 300.0
    """Time in which the CPU starts the kernels of a layer, forward or backward: a layer never takes less; assumed."""
