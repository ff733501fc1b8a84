"""Scaling of one run: the fastest layout for each of a series of GPU counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.hardware import Links
from mesh_megatron.planning.search import Found, search


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Size of a global batch in sequences: fixed, or proportional to the number of GPUs."""

    sequences: int
    for_each_gpu: bool = False

    @property
    def name(self) -> str:
        return f"{self.sequences:,} sequences" + (" for each GPU" if self.for_each_gpu else "")

    def of(self, world_size: int) -> int:
        """Return the global batch size on ``world_size`` GPUs."""
        return self.sequences * (world_size if self.for_each_gpu else 1)


def doublings(first: int, last: int) -> list[int]:
    """Return ``first``, twice that, and so on up to ``last``; raise ``ValueError`` if ``first > last``."""
    sizes = []
    while first <= last:
        sizes.append(first)
        first *= 2
    if not sizes:
        raise ValueError(
            f"--world-size {last}: scaling starts at one node, --gpus-per-node {first}: raise --world-size"
        )
    return sizes


def scale(
    run: RunConfig,
    batch: Batch,
    world_sizes: Sequence[int],
    links: Links,
    room: float,
    report: Callable[[str], None],
    tensor_across_nodes: bool = False,
) -> list[Found]:
    """Find the fastest layout for each of ``world_sizes``, as ``search`` does; pass sizes without any to ``report``."""
    points = []
    for world_size in world_sizes:
        training = replace(run.training, global_batch_size=batch.of(world_size))
        try:
            tried = replace(run, training=training)
            points += search(tried, world_size, links, room, keep=1, tensor_across_nodes=tensor_across_nodes)
        except ValueError as error:
            report(f"{batch.name}: {error}")
    return points


def numbers(found: Found) -> dict[str, Any]:
    """Return one point as a JSON record; times in seconds, memory in bytes."""
    parallel, whole = found.run.parallel, found.duration
    return {
        "gpus": found.world_size,
        "global_batch_size": found.run.training.global_batch_size,
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "data": parallel.data_parallel_size(found.world_size),
        "micro_batch_size": found.run.training.micro_batch_size,
        "recompute": parallel.recompute_granularity,
        "step": found.time.total,
        "by_reason": found.time.by_reason(),
        "bubble": found.time.bubble,
        "tokens_a_second": whole.tokens_a_second,
        "mfu": whole.mfu,
        "memory": found.fullest.total,
    }
