"""Named ranges for profiles of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.utils import nvtx_range_pop, nvtx_range_push
from torch.profiler import record_function


@contextmanager
def profiler_range(name: str) -> Iterator[None]:
    """Open a range in torch's profiler, and in NVTX if Megatron-Core's ranges are on (with ``--profile``)."""
    with record_function(name):
        nvtx_range_push(name)
        yield
        nvtx_range_pop(name)


def name_of_cycle(cycle: int, loops: int) -> str:
    """Name a cycle: 0 is the prelude, 1..K are loops 0..K-1 of the core, K + 1 is the coda."""
    return "prelude" if cycle == 0 else "coda" if cycle > loops else f"core, loop {cycle - 1}"
