"""The order in which a rank of the ring works: Megatron-Core's interleaved schedule, as it stands.

Micro-batches go in groups of P through chunk 0, then the same group through chunk 1, and so on. After some passes of
warm-up every forward pass is followed by a backward pass; backward passes take groups in the same order, chunks from
the last to the first.
"""

from __future__ import annotations

from typing import NamedTuple


class Pass(NamedTuple):
    """One micro-batch through one chunk of a rank."""

    kind: str
    """F or B."""
    chunk: int
    micro_batch: int


def order_of_work(ranks: int, rank: int, chunks: int, micro_batches: int) -> list[Pass]:
    """All passes of one step on ``rank`` of a ring of ``ranks``; ``micro_batches`` must be a multiple of ``ranks``."""
    if ranks == 1:
        return [Pass(kind, 0, i) for i in range(micro_batches) for kind in "FB"]
    slots = [
        (chunk, micro_batch)
        for group in range(0, micro_batches, ranks)
        for chunk in range(chunks)
        for micro_batch in range(group, group + ranks)
    ]
    forward = [Pass("F", chunk, micro_batch) for chunk, micro_batch in slots]
    backward = [Pass("B", chunks - 1 - chunk, micro_batch) for chunk, micro_batch in slots]
    warm_up = min(2 * (ranks - rank - 1) + (chunks - 1) * ranks, len(slots))
    steady = [work for pair in zip(forward[warm_up:], backward, strict=False) for work in pair]
    return forward[:warm_up] + steady + backward[len(slots) - warm_up :]
