"""The boundary's arithmetic in plain torch, with few passes over [S, B, D]: for CPUs and without Triton.

``forward`` and ``backward`` implement ``next_state`` of ``memory_op.py``, as do those of ``memory_triton.py``. Neither
saves tensors for the backward pass; ``memory_op.py`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mesh_megatron.model.memory import Gate, accumulation_dtype, gated, gated_backward, mix, router_gradients


class Boundary(NamedTuple):
    """Inputs and results of the forward pass of the boundary of cycle c."""

    sources: Sequence[Tensor]
    """(h_emb, y_0, ..., y_c), each [S, B, D]."""
    routings: Sequence[Tensor]
    """(w_i, r_i) of cycles 0 to c, each [S, B, 2M]."""
    state: Tensor
    """s_{c+1} [S, B, D]."""
    next_routing: Tensor | None
    """Routing of cycle c + 1; None without a router."""
    weight: Tensor | None
    """The next cycle's router weight [2M, D]; None without a router."""
    gate: Gate = "softmax"
    """From the next router's logits to its routing."""


class LaterGradient(NamedTuple):
    """Gradients that the boundary of cycle j passes to earlier boundaries."""

    state: Tensor
    """g_j [S, B, D], the complete gradient of s_{j+1}."""
    routing: Tensor
    """(w_j, r_j) [S, B, 2M]."""
    products: Tensor
    """<g_j, source> over D for every source of cycle j: [S, B, j + 2]."""


class BoundaryGradients(NamedTuple):
    """Gradients that are complete after the backward pass of the boundary of cycle c."""

    state: Tensor | None
    """g_c [S, B, D], the incoming gradient of s_{c+1} plus that of the next router; None at c = 0."""
    products: Tensor
    """<g_c, source> over D for every source: [S, B, c + 2]."""
    embedding: Tensor | None
    """Gradient of h_emb [S, B, D], only at c = 0."""
    output: Tensor
    """Gradient of y_c [S, B, D]."""
    routing: Tensor
    """Gradient of (w_c, r_c) [S, B, 2M]."""
    weight: Tensor | None
    """Gradient of the next cycle's router weight [2M, D]; None without a router."""
    bias: Tensor | None


def forward(
    sources: Sequence[Tensor],
    routings: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Gate = "softmax",
) -> tuple[Tensor, Tensor | None]:
    """Compute s_{c+1} [S, B, D], and from it the routing [S, B, 2M] of cycle c + 1 (None without a router)."""
    state = mix(sources, [_write(routing) for routing in routings], _read(routings[-1]))
    if weight is None:
        return state, None
    return state, gated(F.linear(state.to(weight.dtype), weight, bias), gate)


def backward(
    boundary: Boundary, grad_state: Tensor, grad_next_routing: Tensor | None, later: Sequence[LaterGradient]
) -> BoundaryGradients:
    """Compute every gradient that is complete once g_c is; ``later`` are the gradients of later boundaries."""
    sources, routings, state, next_routing, weight, gate = boundary
    precision = accumulation_dtype(state.dtype)
    grad_weight = grad_bias = None
    gradient = grad_state.to(precision)
    if weight is not None and next_routing is not None and grad_next_routing is not None:
        grad_logits = gated_backward(grad_next_routing, next_routing, gate)
        gradient = torch.addmm(gradient.flatten(0, 1), grad_logits.flatten(0, 1), weight).view_as(gradient)
        grad_weight, grad_bias = router_gradients(grad_logits, state)

    scratch = torch.empty_like(gradient)  # allocating memory for each would take most of the time
    products = torch.stack([torch.mul(gradient, source, out=scratch).sum(-1) for source in sources], dim=-1)
    here = LaterGradient(gradient.to(state.dtype), routings[-1], products)
    cycle, everywhere = len(routings) - 1, [*later, here]
    grad_output = _weighted_sum([_coefficient(_read(g.routing), routings[-1]) for g in everywhere], everywhere)
    grad_embedding = _weighted_sum([_read(g.routing)[..., :1] for g in everywhere], everywhere) if cycle == 0 else None
    return BoundaryGradients(
        state=here.state if cycle > 0 else None,
        products=products,
        embedding=grad_embedding,
        output=grad_output,
        routing=_routing_gradient(routings, products, everywhere),
        weight=grad_weight,
        bias=grad_bias,
    )


def _routing_gradient(routings: Sequence[Tensor], products: Tensor, everywhere: Sequence[LaterGradient]) -> Tensor:
    """Compute d w_c = sum_{j >= c} <g_j, y_c> r_j and d r_c = <g_c, h_emb> e_0 + sum_i <g_c, y_i> w_i."""
    column = len(routings)  # of y_c among (h_emb, y_0, ..., y_j)
    grad_write = sum(g.products[..., column : column + 1] * _read(g.routing) for g in everywhere)
    grad_read = sum(products[..., i + 1 : i + 2] * _write(routing) for i, routing in enumerate(routings))
    grad_routing = torch.cat([torch.as_tensor(grad_write), torch.as_tensor(grad_read)], dim=-1)
    grad_routing[..., grad_routing.shape[-1] // 2] += products[..., 0]
    return grad_routing


def _weighted_sum(coefficients: Sequence[Tensor], gradients: Sequence[LaterGradient]) -> Tensor:
    """Compute sum_j coefficient_j g_j [S, B, D], the latest cycle first."""
    dtype = gradients[0].state.dtype
    total = coefficients[0] * gradients[0].state.to(accumulation_dtype(dtype))
    for coefficient, gradient in zip(coefficients[1:], gradients[1:], strict=True):
        total.addcmul_(coefficient, gradient.state)
    return total.to(dtype)


def _coefficient(read: Tensor, routing: Tensor) -> Tensor:
    """Compute <r, w> per token, [S, B, 1]."""
    return (read * _write(routing)).sum(-1, keepdim=True)


def _write(routing: Tensor) -> Tensor:
    return routing[..., : routing.shape[-1] // 2]


def _read(routing: Tensor) -> Tensor:
    return routing[..., routing.shape[-1] // 2 :]
