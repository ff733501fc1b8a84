"""Small collectives that exchange values and failures, so that all ranks continue or stop together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mesh_megatron.platform import device

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Gather every rank's ``value``, which must be picklable, in the order of ranks."""
    values: list[Any] = [None] * device.world_size()
    dist.all_gather_object(values, value)
    return values


def gather_numbers(numbers: Sequence[float]) -> Tensor:
    """Gather every rank's ``numbers`` as float64 [ranks, numbers].

    This is one all-gather; ``gather`` needs a second one for the sizes of the objects.
    """
    mine = device.on_device(numbers, torch.float64)
    everyones = mine.new_empty(device.world_size(), len(numbers))
    dist.all_gather(list(everyones), mine)
    return everyones


def largest(value: int) -> int:
    """Return the largest ``value`` of all ranks."""
    return largest_of_each([value])[0]


def largest_of_each(values: Sequence[int]) -> list[int]:
    """Return the largest of the ranks' values at each place: one all-reduce, one wait."""
    tensor = device.on_device(values, torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def first_failure(failure: str | None) -> str | None:
    """Return the lowest-ranked ``failure`` that is not None, with its rank; the result is the same on every rank."""
    failures = {rank: text for rank, text in enumerate(gather(failure)) if text is not None}
    return next((f"rank {rank}: {text}" for rank, text in failures.items()), None)
