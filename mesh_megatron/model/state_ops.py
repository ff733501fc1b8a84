"""Operations on states between blocks: sums and norms in float32, large products in the states' precision.

Shapes: S positions, B sequences, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def at_least_float32(state: Tensor) -> Tensor:
    """Return the state in float32, or as it is in float64."""
    return state.to(torch.promote_types(state.dtype, torch.float32))


def weighted_sum(coefficients: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
    """Compute the sum of states [S, B, D] times their coefficients, numbers or [S, B], in float32."""
    total = sum(c.unsqueeze(-1) * at_least_float32(state) for c, state in zip(coefficients, states, strict=True))
    return torch.as_tensor(total).to(states[0].dtype)


def normalised_product(state: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Compute V x / rms(x) in float32, [S, B, rows], from the state x [S, B, D] and V [rows, D]."""
    return torch.nn.functional.linear(rms_normalised(state, epsilon), weight)


def rms_normalised(state: Tensor, epsilon: float) -> Tensor:
    """Compute x / rms(x) in float32."""
    state = at_least_float32(state)
    return state * (state.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def scaled_norm(state: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """Compute x / rms(x) times ``scale`` [D], in float32 and then the state's precision."""
    return (rms_normalised(state, epsilon) * scale).to(state.dtype)


def keeping_inputs(function: Callable[..., Any], *inputs: Any) -> Any:
    """Compute ``function(*inputs)``; its backward pass keeps the inputs alone and computes the rest again."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def product(state: Tensor, weight: Tensor) -> Tensor:
    """Compute W x [S, B, rows] in the state's precision from x [S, B, D] and W [rows, D] in float32."""
    return _Product.apply(state, weight)


class _Product(torch.autograd.Function):
    """Keeps the float32 weight alone, where autograd would keep a copy in the state's precision for each call."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(state, weight)
        return state @ weight.to(state.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        state, weight = ctx.saved_tensors
        of_weight = gradient.flatten(0, 1).T @ state.flatten(0, 1)
        return gradient @ weight.to(gradient.dtype), of_weight.to(weight.dtype)
