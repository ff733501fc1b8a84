"""Megatron-Core's interleaved schedule on the ring: the order of passes, and a simulation of their timing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Pass(NamedTuple):
    """One micro-batch through one chunk of a rank."""

    kind: str
    """``F`` (forward) or ``B`` (backward)."""
    chunk: int
    micro_batch: int


def order_of_work(ranks: int, rank: int, chunks: int, micro_batches: int) -> list[Pass]:
    """Return the passes of one step on ``rank``, in order; ``micro_batches`` must be a multiple of ``ranks``."""
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


Work = Sequence[tuple[str, int, int]]
"""(``F`` or ``B``, chunk, micro-batch) of each pass, in the order in which one rank runs them."""


@dataclass(frozen=True)
class RingTimes:
    """Durations of passes and messages, in any unit."""

    forward: list[list[float]]
    """``forward[rank][chunk]`` for one micro-batch."""
    backward: list[list[float]]
    hops: list[float]
    """``hops[rank]`` from a rank to its successor on the ring, and back."""
    overlapped: bool = True
    """True if a rank continues to work while its messages are in transit."""

    @classmethod
    def of_layers(cls, layers: list[list[int]]) -> RingTimes:
        """Create times of one unit per layer forward and two backward, without messages; ``layers[rank][chunk]``."""
        forward = [[float(count) for count in chunks] for chunks in layers]
        return cls(forward, [[2 * count for count in chunks] for chunks in forward], [0.0] * len(layers))


@dataclass(frozen=True)
class Task:
    """One pass of one micro-batch through one chunk on one rank, placed in time."""

    rank: int
    kind: str
    chunk: int
    micro_batch: int
    start: float
    stop: float


def replay(work_of_ranks: Sequence[Work], times: RingTimes) -> list[Task]:
    """Simulate the ranks' passes with these times.

    A task starts when its rank is free and its input has arrived; a link carries one message at a time each way.
    """
    ranks, last = len(work_of_ranks), len(times.forward[0]) - 1
    arrived: dict[tuple[int, str, int, int], float] = {}
    links: dict[tuple[int, str], float] = {}
    free, position, tasks = [0.0] * ranks, [0] * ranks, []

    def needed(rank: int, kind: str, chunk: int, micro_batch: int) -> tuple[int, str, int, int] | None:
        if kind == "F":
            if rank > 0:
                return rank - 1, "F", chunk, micro_batch
            return (ranks - 1, "F", chunk - 1, micro_batch) if chunk > 0 else None
        if rank < ranks - 1:
            return rank + 1, "B", chunk, micro_batch
        return (0, "B", chunk + 1, micro_batch) if chunk < last else (rank, "F", chunk, micro_batch)

    def sent(rank: int, kind: str, chunk: int, stop: float) -> float:
        """Return the time at which the result arrives where it is needed."""
        ends = (rank == ranks - 1 and chunk == last) if kind == "F" else (rank == 0 and chunk == 0)
        if ends or ranks == 1:
            return stop
        hop = times.hops[rank if kind == "F" else rank - 1]
        links[rank, kind] = max(stop, links.get((rank, kind), 0.0)) + hop
        return links[rank, kind]

    while any(position[rank] < len(work_of_ranks[rank]) for rank in range(ranks)):
        moved = False
        for rank in range(ranks):
            while position[rank] < len(work_of_ranks[rank]):
                kind, chunk, micro_batch = work_of_ranks[rank][position[rank]]
                need = needed(rank, kind, chunk, micro_batch)
                if need is not None and need not in arrived:
                    break
                start = max(free[rank], arrived[need] if need else 0.0)
                stop = start + (times.forward if kind == "F" else times.backward)[rank][chunk]
                tasks.append(Task(rank, kind, chunk, micro_batch, start, stop))
                arrived[rank, kind, chunk, micro_batch] = arrival = sent(rank, kind, chunk, stop)
                free[rank] = stop if times.overlapped else arrival
                position[rank] += 1
                moved = True
        assert moved, "the order of passes deadlocks"
    return tasks


def bubble(tasks: list[Task]) -> float:
    """Return the share of the ranks' time that they spend waiting."""
    ranks = max(task.rank for task in tasks) + 1
    return 1 - sum(task.stop - task.start for task in tasks) / (ranks * max(task.stop for task in tasks))
