"""Float32 numbers of each token inside a state, the only kind of tensor that the ranks of a ring pass on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def as_state(numbers_SBN: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return a state [S, B, width] of ``dtype`` that holds the bits of N float32 numbers per token, then zeros.

    Its gradient must be one that ``numbers_of`` returned. ``width`` must be at least ``channels(N, dtype)``.
    """
    return _AsState.apply(numbers_SBN, width, dtype)


def numbers_of(state_SBD: Tensor, count: int) -> Tensor:
    """Return the ``count`` numbers [S, B, N] that ``as_state`` stored; their gradient returns in the same way."""
    return _NumbersOf.apply(state_SBD, count)


def channels(count: int, dtype: torch.dtype) -> int:
    """Return the number of channels of ``dtype`` that hold ``count`` float32 numbers."""
    return count * torch.float32.itemsize // dtype.itemsize


def _store(numbers: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    bits = numbers.float().contiguous().view(dtype)
    return F.pad(bits, (0, width - bits.shape[-1]))


def _load(state: Tensor, count: int) -> Tensor:
    return state[..., : channels(count, state.dtype)].contiguous().view(torch.float32).clone()


class _AsState(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        ctx.count = numbers.shape[-1]
        return _store(numbers, width, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _load(gradient, ctx.count), None, None


class _NumbersOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, count: int) -> Tensor:
        ctx.width, ctx.dtype = state.shape[-1], state.dtype
        return _load(state, count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _store(gradient, ctx.width, ctx.dtype), None
