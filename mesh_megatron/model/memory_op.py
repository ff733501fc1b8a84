"""The one operation at each boundary between blocks: the next state, and the next cycle's routing read off it.

The recurrence calls ``next_state`` once a cycle with the history so far (names as in ``memory.py``)::

    deferred = DeferredGradients()
    state, sources, routings = h_emb, [h_emb], [route(h_emb, *router[0])]
    for c in range(K + 1):
        sources.append(block(c, state))
        state, routing = next_state(sources, routings, router[c + 1] if c < K else None, deferred=deferred)
        routings.append(routing)

**Memory.** It keeps references to the history, which lives for the blocks' own backward passes anyway, and 2M numbers
a token. There is no buffer of slots.

**Backward.** With g_j the gradient of s_{j+1}, a source's gradient is d y_i = sum_{j >= i} <r_j, w_i> g_j. Autograd
would add a term to every source at every boundary: O(K^2) tensors of [S, B, D] written, read back and added. But
boundaries run backwards in order, each fed by the next one through y_j and the block between them, so at boundary c

- all of g_K .. g_{c+1} are known, and g_c has just become known;
- y_c is needed next, by the backward pass of block c, and no later step will add to its gradient.

Hence each boundary leaves g_c with the others in ``DeferredGradients``, forms the gradient of the one source that is
now complete (at c = 0 also of h_emb) and returns None for the earlier ones. The same holds for the routings. Each
gradient is written once and no additions are left to autograd, so their order is fixed: run to run identical.
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
from mesh_megatron.model.kernels.memory_torch import LaterGradient
from mesh_megatron.model.memory import mix_slots, router_gradients, softmax_halves, softmax_halves_backward


class RouterWeights(NamedTuple):
    """Weight [2M, D] and bias [2M] of one cycle, in float32; rows 0..M-1 write."""

    weight: Tensor
    bias: Tensor
    normalized: bool = False
    """Read a LayerNorm of the state without parameters."""


class DeferredGradients:
    """One micro-batch's gradients in flight between its boundaries; empty outside of a backward pass.

    Every boundary of the micro-batch shares one, in one graph or in several that run backwards in order (a pipeline
    that hands detached twins of the history from chunk to chunk: the twins' gradients stay None).
    """

    def __init__(self) -> None:
        self._by_cycle: dict[int, LaterGradient] = {}

    def after(self, cycle: int) -> list[LaterGradient]:
        """What later boundaries left, the latest cycle first."""
        return [self._by_cycle[later] for later in sorted(self._by_cycle, reverse=True) if later > cycle]

    def leave(self, cycle: int, gradient: LaterGradient) -> None:
        """Keep it for the boundaries of earlier cycles."""
        self._by_cycle[cycle] = gradient

    def clear(self) -> None:
        """The first boundary is the last to run: the pass is over."""
        self._by_cycle.clear()


def next_state(
    sources: Sequence[Tensor],
    routings: Sequence[Tensor],
    router: RouterWeights | None = None,
    *,
    deferred: DeferredGradients,
    kernel: MemoryKernel = "torch",
) -> tuple[Tensor, Tensor | None]:
    """s_{c+1} [S, B, D] from (h_emb, y_0..y_c) and the routings of cycles 0..c; with ``router``, also cycle c + 1's.

    ``kernel`` is an answer of ``resolve_memory_kernel``. Gradients are right when every cycle's boundary takes part
    with the same ``deferred``, each source having been appended once.
    """
    if len(sources) != len(routings) + 1:
        raise ValueError(f"{len(sources)} sources need {len(sources) - 1} routings, not {len(routings)}")
    if kernel == "slots":
        writes, read = [routing.chunk(2, -1)[0] for routing in routings], routings[-1].chunk(2, -1)[1]
        state = mix_slots(sources, writes, read)
        return state, None if router is None else route(state, *router)
    # A LayerNorm needs the whole row before the first logit, so its router comes after the state, not with it.
    fuse_router = router is not None and not router.normalized
    weight, bias = (router.weight, router.bias) if router is not None and fuse_router else (None, None)
    state, routing = _NextState.apply(_implementation(kernel), deferred, weight, bias, *sources, *routings)
    if router is not None and not fuse_router:
        routing = route(state, *router, kernel=kernel)
    return state, routing


def _implementation(kernel: MemoryKernel) -> ModuleType:
    """The module whose ``forward`` and ``backward`` do the arithmetic."""
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
        weight: Tensor | None,
        bias: Tensor | None,
        *history: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        cycle = len(history) // 2 - 1
        sources, routings = history[: cycle + 2], history[cycle + 2 :]
        state, next_routing = implementation.forward(sources, routings, weight, bias)
        ctx.implementation, ctx.deferred, ctx.cycle = implementation, deferred, cycle
        ctx.save_for_backward(*history, state, next_routing, weight)
        return state, next_routing

    @staticmethod
    def backward(ctx: Any, grad_state: Tensor, grad_next_routing: Tensor | None) -> tuple[Any, ...]:
        cycle = ctx.cycle
        *history, state, next_routing, weight = ctx.saved_tensors
        sources, routings = history[: cycle + 2], history[cycle + 2 :]
        grads = ctx.implementation.backward(
            sources, routings, state, next_routing, weight, grad_state, grad_next_routing, ctx.deferred.after(cycle)
        )
        if grads.state is None:
            ctx.deferred.clear()
        else:
            ctx.deferred.leave(cycle, LaterGradient(grads.state, routings[-1], grads.products))
        earlier = [None] * cycle
        sources_grads = [grads.embedding, *earlier, grads.output]
        return None, None, grads.weight, grads.bias, *sources_grads, *earlier, grads.routing


MemoryKernel = Literal["fused", "torch", "slots"]


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
            from mesh_megatron.model.kernels import route_triton  # needs Triton

            routing = route_triton.forward(state, weight, bias)
        else:
            routing = softmax_halves(F.linear(state.to(weight.dtype), weight, bias))
        ctx.fused = fused
        ctx.save_for_backward(state, weight, routing)
        return routing

    @staticmethod
    def backward(ctx: Any, grad_routing: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        state, weight, routing = ctx.saved_tensors
        if ctx.fused:
            from mesh_megatron.model.kernels import route_triton

            return None, *route_triton.backward(grad_routing, routing, state, weight)
        grad_logits = softmax_halves_backward(grad_routing, routing)
        grad_state = (grad_logits @ weight).to(state.dtype)
        return None, grad_state, *router_gradients(grad_logits, state)


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
