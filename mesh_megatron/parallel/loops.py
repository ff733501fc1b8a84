"""Another number of loops in a step: which chunks of the ring run, and what Megatron-Core must know of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig

from mesh_megatron.config.ring import running
from mesh_megatron.parallel.ring import arrange

Chunks = Sequence[DistributedDataParallel]


def running_chunks(chunks: Chunks, loops: int, exits: bool) -> list[DistributedDataParallel]:
    """Return the chunks that run: the complete model, or those of a ring (``config/ring.py``)."""
    if len(chunks) == 1:
        return [chunks[0]]
    modules: list[Any] = [chunk.module for chunk in chunks]
    return running([module.role for module in modules], chunks, loops, exits)


def set_chunk_loops(chunks: Chunks, loops: int, exits: bool) -> None:
    """Make the modules run the core ``loops`` times, on a ring with ``exits`` with a loss after each.

    Raises ``ValueError`` for more loops than a ring has chunks.
    """
    modules: list[Any] = [chunk.module for chunk in chunks]
    if len(modules) == 1:
        modules[0].set_loops(loops)
        return
    most = modules[0].model.segments.loops
    if not min(most, 1) <= loops <= most:
        raise ValueError(f"a ring of {most} loops cannot run its core {loops} times")
    arrange(modules, loops, exits)


def point_schedule_at(chunks: Chunks, config: TransformerConfig) -> None:
    """Give Megatron-Core's schedules the functions and the number of ``chunks``, those that run in the next step."""
    ddp, alone = chunks[0].ddp_config, len(chunks) == 1
    if ddp.overlap_grad_reduce:
        config.no_sync_func = chunks[0].no_sync if alone else [chunk.no_sync for chunk in chunks]
        if not alone:
            config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
    if ddp.overlap_param_gather:
        config.param_sync_func = chunks[0].start_param_sync if alone else [chunk.start_param_sync for chunk in chunks]
    if not alone:
        config.virtual_pipeline_model_parallel_size = len(chunks)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(len(chunks))


class GradientReadiness:
    """Counts of gradients that Megatron-Core waits for before it reduces a bucket, kept for each number of loops.

    With --overlap-grad-reduce it learns in the first step how often each parameter's gradient arrives. Where layers are
    recomputed it arrives once per loop. So each number of loops has its own first step, in which nothing overlaps.
    """

    def __init__(self, chunks: Chunks, loops: int) -> None:
        self._groups: list[Any] = [
            group
            for chunk in chunks
            if chunk.ddp_config.overlap_grad_reduce
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
        ]
        self._loops = loops
        self._known: dict[int, list[dict[Any, int]]] = {}

    def expect(self, loops: int) -> None:
        """Wait for the gradients of a step of ``loops`` loops from now on."""
        for group in self._groups:
            group.reset()  # a first step ends here
        if not any(group.is_first_batch for group in self._groups):
            self._known[self._loops] = [group.golden_per_param_grad_ready_counts for group in self._groups]
        self._loops = loops
        known = self._known.get(loops)
        for place, group in enumerate(self._groups):
            group.is_first_batch = known is None
            group.golden_per_param_grad_ready_counts = {} if known is None else known[place]
