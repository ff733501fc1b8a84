"""Twins: detached aliases of tensors, which collect gradients of backward passes that run separately.

What computes a tensor may have its backward pass long after what uses it, in another call: on a pipeline, and where
layers are recomputed. The users take the tensor's twin; its gradient is added where the tensor was computed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def twin_of(tensor: Tensor) -> Tensor:
    """Return an alias without a graph, whose ``grad`` collects gradients."""
    return tensor.detach().requires_grad_()


def collect(twins: list[Tensor], through: Tensor, exported: list[Tensor]) -> Tensor:
    """Return ``through``, whose backward pass gives each exported tensor the gradient that its twin has collected.

    It must run after those of all users, and empties the list ``twins``. A twin without a gradient gives None.
    """
    return _Collect.apply(twins, through, *exported)


class _Collect(torch.autograd.Function):
    """Identity on a tensor, with the twins' gradients for the exported ones."""

    @staticmethod
    def forward(ctx, twins: list[Tensor], through: Tensor, *exported: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.twins = twins
        return through.view_as(through)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def,override]
        collected = [twin.grad for twin in ctx.twins]
        for twin in ctx.twins:
            twin.grad = None
        ctx.twins.clear()  # the graph's objects outlive the backward pass, until the next forward pass has ended
        return None, gradient, *collected
