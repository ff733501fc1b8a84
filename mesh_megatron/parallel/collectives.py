"""Ranks that tell each other how it went, so that they go on together or stop together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mesh_megatron.platform import device

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Every rank's value, by rank; it must pickle."""
    values: list[Any] = [None] * device.world_size()
    dist.all_gather_object(values, value)
    return values


def gather_numbers(numbers: Sequence[float]) -> Tensor:
    """Every rank's ``numbers`` [ranks, numbers], by rank: one transfer, where objects need their sizes first."""
    mine = device.on_device(numbers, torch.float64)
    everyones = mine.new_empty(device.world_size(), len(numbers))
    dist.all_gather(list(everyones), mine)
    return everyones


def largest(value: int) -> int:
    """The largest of the ranks' values."""
    return largest_of_each([value])[0]


def largest_of_each(values: Sequence[int]) -> list[int]:
    """The largest of the ranks' values at each place: one transfer, and one wait for it."""
    tensor = device.on_device(values, torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def first_failure(failure: str | None) -> str | None:
    """The first rank's ``failure`` that is not None, the same on every rank."""
    failures = {rank: text for rank, text in enumerate(gather(failure)) if text is not None}
    return next((f"rank {rank}: {text}" for rank, text in failures.items()), None)
