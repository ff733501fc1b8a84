"""Edges: tensors that pass from one pipeline chunk of a micro-batch to later chunks on the same rank.

The schedule runs each chunk's backward pass separately, later chunks first. A tensor that one chunk computes and later
chunks use therefore crosses as a *twin*: a detached alias that accumulates the gradient of the later chunks. The chunk
that computed the tensor adds that gradient in its own backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class _Receive(torch.autograd.Function):
    """Identity on the state; its backward also gives each exported tensor the gradient accumulated by its twin."""

    @staticmethod
    def forward(ctx, twins: list[Tensor], state: Tensor, *exported: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.twins = twins
        return state.view_as(state)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def,override]
        collected = [twin.grad for twin in ctx.twins]
        for twin in ctx.twins:
            twin.grad = None
        return None, gradient, *collected


def pass_to_later_chunks(
    state: Tensor, memory: Mapping[str, Any], arrived: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Return the state to continue with in this chunk, and ``memory`` for later chunks, with twins for new tensors.

    Tensors that ``arrived`` from earlier chunks are already twins and pass unchanged; so do values that are not
    tensors. A tensor whose twin receives no gradient from later chunks gets the gradient None. This chunk's output must
    depend on the returned state, because the chunk's backward pass starts at its output.
    """
    if not torch.is_grad_enabled():
        return state, dict(memory)
    passing = {id(value) for value in arrived.values()}
    new = {name: value for name, value in memory.items() if isinstance(value, Tensor) and id(value) not in passing}
    twins = {name: tensor.detach().requires_grad_() for name, tensor in new.items()}
    state = _Receive.apply(list(twins.values()), state, *new.values())
    return state, {**memory, **twins}
