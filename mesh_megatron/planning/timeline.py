"""The ring's work placed in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Work = Sequence[tuple[str, int, int]]
"""Forward "F" or backward "B", chunk, micro-batch; in the order one rank does them."""


@dataclass(frozen=True)
class Task:
    """One pass of one micro-batch through one chunk on one rank, placed in time."""

    rank: int
    kind: str
    chunk: int
    micro_batch: int
    start: float
    stop: float


def replay(work_of_ranks: Sequence[Work], layers: list[list[int]]) -> list[Task]:
    """The recorded order with one unit of time a layer forward and two backward; messages take none.

    ``layers[rank][chunk]``. A task starts when its rank is free and what it needs has arrived.
    """
    ranks, last = len(work_of_ranks), len(layers[0]) - 1
    done: dict[tuple[int, str, int, int], float] = {}
    free, position, tasks = [0.0] * ranks, [0] * ranks, []

    def needed(rank: int, kind: str, chunk: int, micro_batch: int) -> tuple[int, str, int, int] | None:
        if kind == "F":
            if rank > 0:
                return rank - 1, "F", chunk, micro_batch
            return (ranks - 1, "F", chunk - 1, micro_batch) if chunk > 0 else None
        if rank < ranks - 1:
            return rank + 1, "B", chunk, micro_batch
        return (0, "B", chunk + 1, micro_batch) if chunk < last else (rank, "F", chunk, micro_batch)

    while any(position[rank] < len(work_of_ranks[rank]) for rank in range(ranks)):
        moved = False
        for rank in range(ranks):
            while position[rank] < len(work_of_ranks[rank]):
                kind, chunk, micro_batch = work_of_ranks[rank][position[rank]]
                need = needed(rank, kind, chunk, micro_batch)
                if need is not None and need not in done:
                    break
                start = max(free[rank], done[need] if need else 0.0)
                stop = start + layers[rank][chunk] * (1 if kind == "F" else 2)
                tasks.append(Task(rank, kind, chunk, micro_batch, start, stop))
                done[rank, kind, chunk, micro_batch] = free[rank] = stop
                position[rank] += 1
                moved = True
        assert moved, "the recorded order waits for itself"
    return tasks


def bubble(tasks: list[Task]) -> float:
    """Share of the ranks' time in which they wait."""
    ranks = max(task.rank for task in tasks) + 1
    return 1 - sum(task.stop - task.start for task in tasks) / (ranks * max(task.stop for task in tasks))
