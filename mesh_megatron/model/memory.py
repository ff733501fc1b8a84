"""MeSH's memory (Section 3.2), reading and writing M slots without ever building them.

Shapes: S positions, B sequences, D channels, M slots. ``sources`` are (h_emb, y_0, ..., y_c), each [S, B, D];
``writes`` are (w_0, ..., w_c) and ``read`` is r_c, each [S, B, M] in float32. A cycle's *routing* is both of its
weights in one tensor, (w_c, r_c) as [S, B, 2M].

Here is the mathematics in plain torch. What a training run uses is ``next_state`` in ``memory_boundary.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mesh_megatron.model.fused import fused_kernels_run, require_fused_kernels

MemoryKernel = Literal["fused", "torch", "slots"]


def mix(sources: Sequence[Tensor], writes: Sequence[Tensor], read: Tensor) -> Tensor:
    """The state after cycle c, s_{c+1} = r_0 h_emb + sum_i <r, w_i> y_i, as [S, B, D] in the sources' dtype.

    Every slot is a linear sum of what was written, so its weighted sum is one of the history: the history form of
    ``mix_slots``. Accumulated in float32, in the order of the history (float64 sources stay float64).
    """
    precision = accumulation_dtype(sources[0].dtype)
    state_SBD = read[..., :1] * sources[0].to(precision)
    for output_SBD, write_SBM in zip(sources[1:], writes, strict=True):
        state_SBD.addcmul_((read * write_SBM).sum(-1, keepdim=True), output_SBD)
    return state_SBD.to(sources[0].dtype)


def mix_slots(sources: Sequence[Tensor], writes: Sequence[Tensor], read: Tensor) -> Tensor:
    """The same in the paper's words, m_b = m_b + w_b y for every cycle, then s = sum_b r_b m_b.

    The specification: it holds M copies of [S, B, D] a cycle for the backward pass. Kept for tests and benchmarks.
    """
    precision = accumulation_dtype(sources[0].dtype)
    embedding_SBD = sources[0].to(precision)
    slots = read.shape[-1]
    memory_SBMD = torch.stack([embedding_SBD] + [torch.zeros_like(embedding_SBD)] * (slots - 1), dim=-2)
    for output_SBD, write_SBM in zip(sources[1:], writes, strict=True):
        memory_SBMD = memory_SBMD + write_SBM.unsqueeze(-1) * output_SBD.to(precision).unsqueeze(-2)
    return (read.unsqueeze(-1) * memory_SBMD).sum(-2).to(sources[0].dtype)


def route(
    state: Tensor, weight: Tensor, bias: Tensor, normalized: bool = False, kernel: MemoryKernel = "torch"
) -> Tensor:
    """A cycle's routing [S, B, 2M] from the state [S, B, D] that enters it; both halves are softmaxed over M slots.

    ``weight`` is [2M, D], ``bias`` [2M]; rows 0..M-1 write. ``normalized`` reads a LayerNorm of the state without
    parameters. Computed in ``weight``'s precision, float32, whatever the state's; kept for the backward pass is the
    state itself and not a float32 copy of it. ``kernel`` is an answer of ``resolve_memory_kernel``.
    """
    if normalized:
        state = F.layer_norm(state, state.shape[-1:])
    return _Route.apply(kernel == "fused", state, weight, bias)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: bool, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if fused:
            from mesh_megatron.model import route_kernel  # needs Triton

            routing = route_kernel.forward(state, weight, bias)
        else:
            routing = softmax_halves(F.linear(state.to(weight.dtype), weight, bias))
        ctx.fused = fused
        ctx.save_for_backward(state, weight, routing)
        return routing

    @staticmethod
    def backward(ctx: Any, grad_routing: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        state, weight, routing = ctx.saved_tensors
        if ctx.fused:
            from mesh_megatron.model import route_kernel

            return None, *route_kernel.backward(grad_routing, routing, state, weight)
        grad_logits = softmax_halves_backward(grad_routing, routing)
        grad_state = (grad_logits @ weight).to(state.dtype)
        return None, grad_state, *router_gradients(grad_logits, state)


def softmax_halves(logits: Tensor) -> Tensor:
    """Softmax over the write half and over the read half of [..., 2M]."""
    return logits.unflatten(-1, (2, -1)).softmax(-1).flatten(-2)


def softmax_halves_backward(grad_routing: Tensor, routing: Tensor) -> Tensor:
    """Gradient of the logits [..., 2M]: p (g - <g, p>) in each half."""
    weighted = (grad_routing * routing).unflatten(-1, (2, -1))
    inner = weighted.sum(-1, keepdim=True)
    return (weighted - routing.unflatten(-1, (2, -1)) * inner).flatten(-2)


def router_gradients(grad_logits: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a router's weight [2M, D] and bias [2M]."""
    flat_logits, flat_state = grad_logits.flatten(0, 1), state.flatten(0, 1).to(grad_logits.dtype)
    return flat_logits.T @ flat_state, flat_logits.sum(0)


def resolve_memory_kernel(name: str, device: torch.device) -> MemoryKernel:
    """What ``--memory-kernel`` means on ``device``, the device of the model's parameters.

    auto is fused on a GPU with Triton and torch elsewhere; asking for fused where it cannot run raises
    ``ValueError``.
    """
    if name == "auto":
        return "fused" if fused_kernels_run(device) else "torch"
    if name in ("torch", "slots"):
        return "torch" if name == "torch" else "slots"
    if name != "fused":
        raise ValueError(f"--memory-kernel {name}: one of auto, fused, torch, slots")
    require_fused_kernels("--memory-kernel", device)
    return "fused"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums run in float32; float64 stays float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
