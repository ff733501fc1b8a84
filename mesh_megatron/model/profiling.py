"""Names for the parts of a pass, for whoever profiles one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.utils import nvtx_range_pop, nvtx_range_push
from torch.profiler import record_function


@contextmanager
def profiler_range(name: str) -> Iterator[None]:
    """A range in torch's profiler, and in NVTX where Megatron-Core's ranges are on (``--profile`` turns them on)."""
    with record_function(name):
        nvtx_range_push(name)
        yield
        nvtx_range_pop(name)


def name_of_cycle(cycle: int, loops: int) -> str:
    """Cycle 0 is the prelude, 1..K are the loops of the core (from 0), K + 1 is the coda."""
    return "prelude" if cycle == 0 else "coda" if cycle > loops else f"core, loop {cycle - 1}"
