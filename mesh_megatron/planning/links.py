"""How long messages take: NVLink inside a node, one network adapter a GPU between nodes."""

from __future__ import annotations

from dataclasses import dataclass

from mesh_megatron.planning.assumptions import Assumptions
from mesh_megatron.planning.gpus import Gpu


@dataclass(frozen=True)
class Links:
    """Ranks are numbered as Megatron-Core does, tensor, context, data, pipeline; a node holds consecutive ones."""

    gpu: Gpu
    assumptions: Assumptions
    gpus_per_node: int

    def collective(self, bytes_sent: float, ranks: int, stride: int, rounds: int = 1) -> float:
        """Seconds of a ring collective in which each of ``ranks`` ranks, ``stride`` apart, sends so many bytes.

        ``rounds`` is 1 for all-gather, reduce-scatter and all-to-all, 2 for an all-reduce. Where ranks of one node take
        part together, the ring crosses between nodes over all their adapters at once, as NCCL's rings do.
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
        """Seconds of one message from rank to rank of the ring, ``inside`` a node or between nodes."""
        bandwidth = self.gpu.nvlink_gb_s if inside else self.gpu.network_gb_s
        latency = self.assumptions.nvlink_latency_us if inside else self.assumptions.network_latency_us
        return size / (bandwidth * 1e9 * self.assumptions.link_efficiency) + latency * 1e-6

    def hop_is_inside(self, stage: int, ring: int, world_size: int) -> bool:
        """Whether all ranks at place ``stage`` of the ring share a node with their next."""
        size = world_size // ring
        here, there = stage * size, (stage + 1) % ring * size
        return all((here + i) // self.gpus_per_node == (there + i) // self.gpus_per_node for i in range(size))
