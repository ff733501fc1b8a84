"""The fastest layouts of ranks that fit memory, by predicted step time."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.duration import Duration, duration
from mesh_megatron.planning.hardware import Gpu, Links
from mesh_megatron.planning.plan import RECOMPUTE, checked_vocabulary
from mesh_megatron.planning.rank_memory import RankMemory, memory_of_ranks
from mesh_megatron.planning.step_time import StepModel, StepTime
from mesh_megatron.planning.summary import summary_of

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Found:
    """One layout that fits."""

    run: RunConfig
    world_size: int
    gpu: Gpu
    time: StepTime
    fullest: RankMemory

    @property
    def duration(self) -> Duration:
        summary = summary_of(self.run, self.run.model.padded_vocabulary(None), self.world_size)
        return duration(summary, self.gpu, self.time.total)


def search(
    run: RunConfig, world_size: int, links: Links, room: float, keep: int = 10, tensor_across_nodes: bool = False
) -> list[Found]:
    """The ``keep`` fastest layouts of ``run`` whose fullest rank holds at most ``room`` bytes, best first.

    Exact over ``layouts``: they are looked at in the order of a bound below their time, until no bound beats the worst
    that is kept. ``ValueError`` where none is valid (the run's own refusal) or none fits.
    """
    vocabulary, models = 0, []
    for candidate in layouts(run, world_size, links.gpus_per_node, tensor_across_nodes):
        try:
            vocabulary = checked_vocabulary(candidate, world_size)
        except ValueError:
            continue
        models.append(StepModel(candidate, vocabulary, world_size, micro_batches(candidate, world_size), links))
    if not models:
        checked_vocabulary(run, world_size)
        raise ValueError(f"--world-size {world_size}: no layout of ranks is valid for --global-batch-size "
                         f"{run.training.global_batch_size}; change one of the two")  # fmt: skip
    found: list[Found] = []
    least_memory = float("inf")
    for model in sorted(models, key=lambda model: model.least):
        if len(found) == keep and model.least >= found[-1].time.total:
            break
        memory = memory_of_ranks(model.run, vocabulary, world_size, model.micro_batches)
        fullest = max(memory, key=lambda rank: rank.total)
        least_memory = min(least_memory, fullest.total)
        if fullest.total <= room:
            found.append(Found(model.run, world_size, links.gpu, model.simulated(), fullest))
            found = heapq.nsmallest(keep, found, key=_rank)
    if not found:
        raise ValueError(
            f"--world-size {world_size}: no layout fits {room / 2**30:.1f} GiB of a {links.gpu.name}, the smallest "
            f"needs {least_memory / 2**30:.1f} GiB; use more GPUs or another --gpu"
        )
    return found


def layouts(run: RunConfig, world_size: int, gpus_per_node: int, tensor_across_nodes: bool) -> Iterator[RunConfig]:
    """``run`` with every split of the ranks, micro-batch and recompute choice; not yet validated.

    A ring is no longer than its longest segment has layers. Tensor parallelism brings --sequence-parallel, replicas
    bring the distributed optimizer with both overlaps.
    """
    segments, sizes = run.model.segments, divisors(world_size)
    longest = max(segments.prelude, segments.core, segments.coda)
    tensors = [size for size in sizes if tensor_across_nodes or gpus_per_node % size == 0]
    rings = [size for size in sizes if size <= longest]
    for tensor, ring, context in product(tensors, rings, sizes):
        if world_size % (tensor * ring * context):
            continue
        replicas = world_size // (tensor * ring) > 1
        for micro_batch, recompute in product(MICRO_BATCHES, RECOMPUTE):
            parallel = replace(
                run.parallel,
                tensor_model_parallel_size=tensor,
                sequence_parallel=tensor > 1,
                pipeline_model_parallel_size=ring,
                context_parallel_size=context,
                recompute_granularity=recompute,  # type: ignore[arg-type]
                use_distributed_optimizer=replicas,
                overlap_grad_reduce=replicas,
                overlap_param_gather=replicas,
            )
            yield replace(run, parallel=parallel, training=replace(run.training, micro_batch_size=micro_batch))


def micro_batches(run: RunConfig, world_size: int) -> int:
    """Of one data-parallel rank in a step."""
    replicas = run.parallel.data_parallel_size(world_size)
    return run.training.batch_size(replicas) // run.training.micro_batch_size // replicas


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _rank(found: Found) -> tuple[float, int]:
    """Among equally fast ones the one that holds least."""
    return found.time.total, found.fullest.total
