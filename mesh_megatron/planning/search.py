"""Search for the layouts of ranks that fit memory and have the shortest predicted step time."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.duration import Duration, duration
from mesh_megatron.planning.hardware import Gpu, Links
from mesh_megatron.planning.mean_step import MeanStep
from mesh_megatron.planning.plan import RECOMPUTE, checked_vocabulary
from mesh_megatron.planning.rank_memory import RankMemory, memory_of_ranks
from mesh_megatron.planning.step_time import StepTime
from mesh_megatron.planning.summary import summary_of

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Found:
    """One layout that fits, with its predicted step time and fullest rank."""

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
    """Return the ``keep`` fastest layouts of ``run`` whose fullest rank needs at most ``room`` bytes, fastest first.

    The result is exact over ``layouts``: they are tried in the order of a lower bound of their time, until no remaining
    bound is below the slowest kept time. Raise ``ValueError`` if no layout is valid (with the error of ``run``'s own
    settings, if they have one) or none fits, and for --use-torch-fsdp2, which it does not look at.
    """
    if run.parallel.use_torch_fsdp2:
        raise ValueError("--use-torch-fsdp2: the search does not look at it; plan it with --search never, or drop it")
    vocabulary, models = 0, []
    for candidate in layouts(run, world_size, links.gpus_per_node, tensor_across_nodes):
        try:
            vocabulary = checked_vocabulary(candidate, world_size)
        except ValueError:
            continue
        models.append(MeanStep(candidate, vocabulary, world_size, micro_batches(candidate, world_size), links))
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
            f"--world-size {world_size}: no layout fits {room / 2**30:.1f} GiB of a {links.gpu.name}; the smallest "
            f"one needs {least_memory / 2**30:.1f} GiB: use more GPUs or another --gpu"
        )
    return found


def layouts(run: RunConfig, world_size: int, gpus_per_node: int, tensor_across_nodes: bool) -> Iterator[RunConfig]:
    """Yield ``run`` with every split of the ranks, micro-batch size and recompute choice; not yet validated.

    The ring has at most as many ranks as the longest segment has layers. Tensor parallelism sets --sequence-parallel;
    replicas set the distributed optimizer and both of its overlaps, as far as --optimizer has them.
    """
    segments, sizes = run.model.segments, divisors(world_size)
    longest = max(segments.prelude, segments.core, segments.coda)
    tensors = [size for size in sizes if tensor_across_nodes or gpus_per_node % size == 0]
    rings = [size for size in sizes if size <= longest]
    for tensor, ring, context in product(tensors, rings, sizes):
        if world_size % (tensor * ring * context):
            continue
        replicas = world_size // (tensor * ring) > 1
        optimizer = run.training.optimizer
        for micro_batch, recompute in product(MICRO_BATCHES, RECOMPUTE):
            parallel = replace(
                run.parallel,
                tensor_model_parallel_size=tensor,
                sequence_parallel=tensor > 1,
                pipeline_model_parallel_size=ring,
                context_parallel_size=context,
                recompute_granularity=recompute,  # type: ignore[arg-type]
                use_distributed_optimizer=replicas and optimizer != "sgd",
                overlap_grad_reduce=replicas,
                overlap_param_gather=replicas and optimizer == "adam",
            )
            yield replace(run, parallel=parallel, training=replace(run.training, micro_batch_size=micro_batch))


def micro_batches(run: RunConfig, world_size: int) -> int:
    """Return the number of micro-batches per step on one data-parallel rank."""
    replicas = run.parallel.data_parallel_size(world_size)
    return run.training.batch_size(replicas) // run.training.micro_batch_size // replicas


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number`` in ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _rank(found: Found) -> tuple[float, int]:
    """Order layouts by step time, and equally fast ones by memory."""
    return found.time.total, found.fullest.total
