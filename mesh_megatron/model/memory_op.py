"""The operation at each boundary between blocks: it computes the next state and, from it, the next cycle's routing.

The recurrence calls ``next_state`` once per cycle with the history so far (names as in ``memory.py``)::

    deferred = DeferredGradients()
    state, sources, routings = h_emb, [h_emb], [route(h_emb, *router[0])]
    for c in range(K + 1):
        sources.append(block(c, state))
        state, routing = next_state(sources, routings, router[c + 1] if c < K else None, deferred=deferred)
        routings.append(routing)

**Memory.** It keeps references to the history, which the blocks' own backward passes keep anyway, and 2M numbers per
token. There is no buffer of slots.

**Backward.** With g_j the gradient of s_{j+1}, a source's gradient is d y_i = sum_{j >= i} <r_j, w_i> g_j. Autograd
would add a term to every source at every boundary: O(K^2) tensors of [S, B, D] written, read back and added. But
the boundaries run backwards in reverse order, because each depends on the next one through the block between them. So
at boundary c

- all of g_K .. g_c are known;
- block c needs the gradient of y_c next, and no later operation adds to it.

Hence each boundary adds g_c to ``DeferredGradients``, computes the one source gradient that is now complete (at c = 0
also that of h_emb) and returns None for the earlier sources. The same holds for the routings. Each gradient is written
once and autograd adds nothing, so the order of sums is fixed and results are identical from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mesh_megatron.model.kernels import memory_torch
from mesh_megatron.model.kernels.availability import fused_kernels_run, require_fused_kernels
from mesh_megatron.model.kernels.memory_torch import Boundary, LaterGradient
from mesh_megatron.model.memory import Gate, gated, gated_backward, mix_slots, router_gradients

RouterInput = Literal["state", "normalized", "rmsnorm"]
MemoryKernel = Literal["fused", "torch", "slots"]


class RouterWeights(NamedTuple):
    """Router weight [2M, D] and bias [2M] of one cycle, in float32; rows 0..M-1 are the write half."""

    weight: Tensor
    bias: Tensor
    input: RouterInput = "state"
    """The router reads the state, a LayerNorm of it (normalized) or an RMSNorm of it, both without parameters."""
    gate: Gate = "softmax"
    """From logits to weights."""


class DeferredGradients:
    """Gradients that the boundaries of one micro-batch pass to earlier ones; empty outside of a backward pass.

    All boundaries of the micro-batch share one instance, within one graph or across several graphs that run backwards
    in order (a pipeline that passes detached twins of the history between chunks; the twins' gradients stay None).
    """

    def __init__(self) -> None:
        self._by_cycle: dict[int, LaterGradient] = {}

    def after(self, cycle: int) -> list[LaterGradient]:
        """Return the gradients that the boundaries after ``cycle`` left, the latest cycle first."""
        return [self._by_cycle[later] for later in sorted(self._by_cycle, reverse=True) if later > cycle]

    def leave(self, cycle: int, gradient: LaterGradient) -> None:
        """Store the gradient of ``cycle`` for the boundaries of earlier cycles."""
        self._by_cycle[cycle] = gradient

    def clear(self) -> None:
        """Delete all gradients; the first boundary, the last to run backwards, calls this."""
        self._by_cycle.clear()


def next_state(
    sources: Sequence[Tensor],
    routings: Sequence[Tensor],
    router: RouterWeights | None = None,
    *,
    deferred: DeferredGradients,
    kernel: MemoryKernel = "torch",
) -> tuple[Tensor, Tensor | None]:
    """Compute s_{c+1} [S, B, D] from (h_emb, y_0..y_c) and the routings of cycles 0..c (Section 3.2).

    With ``router`` also the routing of cycle c + 1, else None. ``kernel`` is a result of ``resolve_memory_kernel``.
    Gradients are correct if every cycle's boundary uses the same ``deferred`` and each source was appended once.
    Raises ``ValueError`` for a wrong number of routings.
    """
    if len(sources) != len(routings) + 1:
        raise ValueError(f"{len(sources)} sources need {len(sources) - 1} routings, not {len(routings)}")
    if kernel == "slots":
        writes, read = [routing.chunk(2, -1)[0] for routing in routings], routings[-1].chunk(2, -1)[1]
        state = mix_slots(sources, writes, read)
        return state, None if router is None else route(state, *router)
    # A norm needs the complete row before the first logit, so its router runs after the state, not fused with it.
    fuse_router = router is not None and router.input == "state"
    weight, bias = (router.weight, router.bias) if router is not None and fuse_router else (None, None)
    gate = "softmax" if router is None else router.gate
    state, routing = _NextState.apply(_implementation(kernel), deferred, gate, weight, bias, *sources, *routings)
    if router is not None and not fuse_router:
        routing = route(state, *router, kernel=kernel)
    return state, routing


def _implementation(kernel: MemoryKernel) -> ModuleType:
    """Return the module whose ``forward`` and ``backward`` do the arithmetic."""
    if kernel == "fused":
        from mesh_megatron.model.kernels import memory_triton  # needs Triton

        return memory_triton
    return memory_torch


class _NextState(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        implementation: ModuleType,
        deferred: DeferredGradients,
        gate: Gate,
        weight: Tensor | None,
        bias: Tensor | None,
        *history: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        cycle = len(history) // 2 - 1
        sources, routings = history[: cycle + 2], history[cycle + 2 :]
        state, next_routing = implementation.forward(sources, routings, weight, bias, gate)
        ctx.implementation, ctx.deferred, ctx.gate, ctx.cycle = implementation, deferred, gate, cycle
        ctx.save_for_backward(*history, state, next_routing, weight)
        return state, next_routing

    @staticmethod
    def backward(ctx: Any, grad_state: Tensor, grad_next_routing: Tensor | None) -> tuple[Any, ...]:
        cycle = ctx.cycle
        *history, state, next_routing, weight = ctx.saved_tensors
        sources, routings = history[: cycle + 2], history[cycle + 2 :]
        boundary = Boundary(sources, routings, state, next_routing, weight, ctx.gate)
        grads = ctx.implementation.backward(boundary, grad_state, grad_next_routing, ctx.deferred.after(cycle))
        if grads.state is None:
            ctx.deferred.clear()
        else:
            ctx.deferred.leave(cycle, LaterGradient(grads.state, routings[-1], grads.products))
        earlier = [None] * cycle
        sources_grads = [grads.embedding, *earlier, grads.output]
        return None, None, None, grads.weight, grads.bias, *sources_grads, *earlier, grads.routing


def route(
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    input: RouterInput = "state",
    gate: Gate = "softmax",
    kernel: MemoryKernel = "torch",
) -> Tensor:
    """Compute a cycle's routing [S, B, 2M] from the state [S, B, D] that enters it, by ``gate`` (see ``gated``).

    ``weight`` is [2M, D], ``bias`` [2M]; rows 0..M-1 are the write half. ``input`` is as in ``RouterWeights``. Computes
    in ``weight``'s precision, float32, whatever the state's dtype; the backward pass keeps the state itself, no float32
    copy. ``kernel`` is a result of ``resolve_memory_kernel``.
    """
    return _Route.apply(kernel == "fused", gate, router_input(state, input), weight, bias)


def router_input(state: Tensor, kind: RouterInput) -> Tensor:
    """Return what a router reads of ``state`` [S, B, D]; x / sqrt(mean(x^2) + 1e-5) for rmsnorm."""
    if kind == "normalized":
        return F.layer_norm(state, state.shape[-1:])
    return F.rms_norm(state, state.shape[-1:], eps=1e-5) if kind == "rmsnorm" else state


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: bool, gate: Gate, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if fused:
            from mesh_megatron.model.kernels import route_triton  # needs Triton

            routing = route_triton.forward(state, weight, bias, gate)
        else:
            routing = gated(F.linear(state.to(weight.dtype), weight, bias), gate)
        ctx.fused, ctx.gate = fused, gate
        ctx.save_for_backward(state, weight, routing)
        return routing

    @staticmethod
    def backward(ctx: Any, grad_routing: Tensor) -> tuple[None, None, Tensor, Tensor, Tensor]:
        state, weight, routing = ctx.saved_tensors
        if ctx.fused:
            from mesh_megatron.model.kernels import route_triton

            return None, None, *route_triton.backward(grad_routing, routing, state, weight, ctx.gate)
        grad_logits = gated_backward(grad_routing, routing, ctx.gate)
        grad_state = (grad_logits @ weight).to(state.dtype)
        return None, None, grad_state, *router_gradients(grad_logits, state)


def resolve_memory_kernel(name: str, device: torch.device) -> MemoryKernel:
    """Resolve ``--memory-kernel`` on ``device``, the device of the model's parameters.

    auto is fused on a GPU with Triton, else torch. Raises ``ValueError`` if fused is requested and cannot run.
    """
    if name == "auto":
        return "fused" if fused_kernels_run(device) else "torch"
    if name in ("torch", "slots"):
        return "torch" if name == "torch" else "slots"
    if name != "fused":
        raise ValueError(f"--memory-kernel {name}: one of auto, fused, torch, slots")
    require_fused_kernels("--memory-kernel", device)
    return "fused"
