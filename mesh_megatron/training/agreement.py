"""Ranks that tell each other how it went, so that they go on together or stop together."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mesh_megatron.platform import device

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Every rank's value, by rank; it must pickle."""
    values: list[Any] = [None] * device.world_size()
    dist.all_gather_object(values, value)
    return values


def largest(value: int) -> int:
    """The largest of the ranks' values."""
    tensor = torch.tensor(value, device=device.device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def first_failure(failure: str | None) -> str | None:
    """The first rank's ``failure`` that is not None, the same on every rank."""
    failures = {rank: text for rank, text in enumerate(gather(failure)) if text is not None}
    return next((f"rank {rank}: {text}" for rank, text in failures.items()), None)
