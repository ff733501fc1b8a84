"""MeSH's memory (Section 3.2): reads and writes M slots without storing them.

Shapes: S positions, B sequences, D channels, M slots. ``sources`` are (h_emb, y_0, ..., y_c), each [S, B, D];
``writes`` are (w_0, ..., w_c) and ``read`` is r_c, each [S, B, M] in float32. A cycle's *routing* is both
weights in one tensor, (w_c, r_c) as [S, B, 2M].

This file is the mathematics in plain torch; training uses ``next_state`` in ``memory_op.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Gate = Literal["softmax", "sigmoid"]


def mix(sources: Sequence[Tensor], writes: Sequence[Tensor], read: Tensor) -> Tensor:
    """Compute the state after cycle c, s_{c+1} = r_0 h_emb + sum_i <r, w_i> y_i: [S, B, D] in the sources' dtype.

    Every slot is a linear combination of the sources, so the weighted sum of slots is one too: this is ``mix_slots``
    without slots. Accumulates in float32, in the order of the sources (float64 sources stay float64).
    """
    precision = accumulation_dtype(sources[0].dtype)
    state_SBD = read[..., :1] * sources[0].to(precision)
    for output_SBD, write_SBM in zip(sources[1:], writes, strict=True):
        state_SBD.addcmul_((read * write_SBM).sum(-1, keepdim=True), output_SBD)
    return state_SBD.to(sources[0].dtype)


def mix_slots(sources: Sequence[Tensor], writes: Sequence[Tensor], read: Tensor) -> Tensor:
    """Compute the same as the paper writes it: m_b = m_b + w_b y for every cycle, then s = sum_b r_b m_b.

    This is the specification, for tests and benchmarks: it keeps M tensors [S, B, D] per cycle for the backward pass.
    """
    precision = accumulation_dtype(sources[0].dtype)
    embedding_SBD = sources[0].to(precision)
    slots = read.shape[-1]
    memory_SBMD = torch.stack([embedding_SBD] + [torch.zeros_like(embedding_SBD)] * (slots - 1), dim=-2)
    for output_SBD, write_SBM in zip(sources[1:], writes, strict=True):
        memory_SBMD = memory_SBMD + write_SBM.unsqueeze(-1) * output_SBD.to(precision).unsqueeze(-2)
    return (read.unsqueeze(-1) * memory_SBMD).sum(-2).to(sources[0].dtype)


def gated(logits: Tensor, gate: Gate = "softmax") -> Tensor:
    """Compute the routing [..., 2M] from logits of the same shape, the write half before the read half.

    softmax: w_b = exp(z_b) / sum_j exp(z_j) over the M slots of a half; the weights of each half add up to one.
    sigmoid: w_b = 1 / (1 + exp(-z_b)); every weight by itself.
    """
    if gate == "sigmoid":
        return logits.sigmoid()
    return logits.unflatten(-1, (2, -1)).softmax(-1).flatten(-2)


def gated_backward(grad_routing: Tensor, routing: Tensor, gate: Gate = "softmax") -> Tensor:
    """Compute the gradient of the logits [..., 2M]: p (g - <g, p>) in each half, for sigmoid p (1 - p) g."""
    if gate == "sigmoid":
        return grad_routing * routing * (1 - routing)
    weighted = (grad_routing * routing).unflatten(-1, (2, -1))
    inner = weighted.sum(-1, keepdim=True)
    return (weighted - routing.unflatten(-1, (2, -1)) * inner).flatten(-2)


def router_gradients(grad_logits: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a router's weight [2M, D] and bias [2M]."""
    flat_logits, flat_state = grad_logits.flatten(0, 1), state.flatten(0, 1).to(grad_logits.dtype)
    return flat_logits.T @ flat_state, flat_logits.sum(0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
