"""Ranks that tell each other how it went, so that they go on together or stop together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from mesh_megatron.platform import device

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Every rank's value, by rank; it must pickle."""
    values: list[Any] = [None] * device.world_size()
    dist.all_gather_object(values, value)
    return values


def first_failure(failure: str | None) -> str | None:
    """The first rank's ``failure`` that is not None, the same on every rank."""
    failures = {rank: text for rank, text in enumerate(gather(failure)) if text is not None}
    return next((f"rank {rank}: {text}" for rank, text in failures.items()), None)


def from_rank_zero(work: Callable[[], T]) -> T:
    """What ``work`` returns on rank 0, the only one to call it; its ``ValueError`` is raised on every rank."""
    message: list[Any] = [None, None]
    if device.rank() == 0:
        try:
            message[0] = work()
        except ValueError as error:
            message[1] = str(error)
    dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise ValueError(message[1])
    return message[0]
