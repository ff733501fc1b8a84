"""Edges: tensors that pass from one pipeline chunk of a micro-batch to later ones on the same rank.

The schedule runs each chunk's backward pass by itself, later chunks first. A tensor made in one chunk and used in
later ones therefore crosses as a *twin*: a detached alias, in which the later chunks leave their gradient. The chunk
that made the tensor adds that gradient when its own backward pass comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class _Receive(torch.autograd.Function):
    """Identity on the state; backward also hands each exported tensor the gradient its twin has collected."""

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
    """``memory`` for later chunks to use, and ``state`` to go on with in this one.

    What ``arrived`` from earlier chunks are twins already and passes through, as does whatever is no tensor; other
    tensors get a twin. One that later chunks sent no gradient has None in its twin, and that is what it gets. The
    returned state must lead to this chunk's output, for that is where the chunk's backward pass starts.
    """
    if not torch.is_grad_enabled():
        return state, dict(memory)
    passing = {id(value) for value in arrived.values()}
    new = {name: value for name, value in memory.items() if isinstance(value, Tensor) and id(value) not in passing}
    twins = {name: tensor.detach().requires_grad_() for name, tensor in new.items()}
    state = _Receive.apply(list(twins.values()), state, *new.values())
    return state, {**memory, **twins}
