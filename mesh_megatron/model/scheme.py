"""A recurrence scheme as a module: the base class of all schemes, which is the base recursion.

Cycle 0 is the prelude, cycles 1..K are the loops of the core. A scheme is called at the start and the end of
every cycle. Between calls it keeps its data in a ``Memory``, a plain mapping of names to tensors (and to objects
outside of the graph). It does not depend on layers or ranks; a pipeline passes the mapping from chunk to chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mesh_megatron.config.loops import loops_without_gradients
from mesh_megatron.config.scheme import SchemeSpec
from mesh_megatron.model.norm import mark_sequence_parallel
from mesh_megatron.model.state_ops import keeping_inputs, scaled_norm
from mesh_megatron.model.transformer_config import MeshTransformerConfig

Memory = Mapping[str, Any]


class Weights(nn.Module):
    """Parameters of a scheme under one name.

    Call the module to get them, so that its hooks run: a distributed optimizer gathers parameters there.
    """

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(self.parameters(recurse=False))


class Scheme(Weights):
    """The base recursion, h(t+1) = f_core(h(t)): the output of a cycle is the next state.

    The parameters that ``spec`` describes are created under their names, such as ``router.weight``.
    """

    def __init__(self, spec: SchemeSpec, config: MeshTransformerConfig) -> None:
        super().__init__()
        self.config, self.spec, self.model = config, spec, spec.model
        self.loops = spec.loops
        """Number of loops that the model runs now; the parameters are those of ``spec.loops``."""
        for name, parameter in spec.all_parameters().items():
            *path, leaf = name.split(".")
            empty = torch.empty(parameter.shape, dtype=torch.float32)
            _submodule(self, path).register_parameter(leaf, nn.Parameter(empty))
        for module in self.modules():
            mark_sequence_parallel(module, config)

    @property
    def cut(self) -> int:
        """Number of the first loops that run without gradients (``--backprop-loops``)."""
        return loops_without_gradients(self.loops, self.config.backprop_loops)

    def weights(self, name: str = "") -> tuple[Tensor, ...]:
        """Return the parameters NAME.* in the order of ``spec``, or those without a dot in their name."""
        return self.get_submodule(name)()

    def begin(self, embedding_SBD: Tensor) -> Memory:
        """Return the memory before cycle 0, from the scaled embedding h_emb [S, B, D]."""
        return {}

    def enter(self, cycle: int, state_SBD: Tensor, memory: Memory) -> Memory:
        """Update the memory with the state [S, B, D] that enters the block of ``cycle``."""
        return memory

    def core_input(self, cycle: int, state_SBD: Tensor) -> Tensor:
        """Return what the block of ``cycle`` reads: in a loop t, RMSNorm(h(t)) + e_t if the model has either.

        The scheme itself sees the state [S, B, D]: norm and vector belong to the core of its equation. Loops beyond K
        take the last vector.
        """
        if cycle == 0:
            return state_SBD
        if self.model.loop_norm:
            (scale,) = self.weights("loop_norm")
            state_SBD = keeping_inputs(scaled_norm, state_SBD, scale, self.model.norm_epsilon)
        if self.model.loop_embedding:
            (vectors,) = self.weights("loop_embedding")
            state_SBD = (state_SBD + vectors[min(cycle, len(vectors)) - 1]).to(state_SBD.dtype)
        return state_SBD

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Compute the next state s_{cycle+1} [S, B, D] from the block's output, and update the memory."""
        return output_SBD, memory

    @property
    def has_exits(self) -> bool:
        """True if training now computes the loss after every loop."""
        return self.training and self.model.losses_after_loops

    def exit_state(self, cycle: int, next_SBD: Tensor, memory: Memory) -> Tensor:
        """Return the state [S, B, D] that would enter the coda if ``cycle`` were the last.

        ``next_SBD`` and ``memory`` are what ``leave`` has returned for it, after ``enter`` with ``has_exits``.
        """
        return next_SBD

    def exit_logits(self, state_SBD: Tensor) -> Tensor:
        """Compute the exit gate [S, B] of states after loops, in float32: logits of the probability to leave."""
        weight, bias = self.weights("exit_gate")
        return F.linear(state_SBD.to(weight.dtype), weight, bias).squeeze(-1)

    def resume(self, cycle: int, state_SBD: Tensor, memory: Memory) -> Memory:
        """Update the memory where gradients begin again: ``state_SBD`` enters ``cycle``, the first with gradients.

        The cycles from 1 on before it ran without gradients, so what they computed for ``cycle`` has none either.
        """
        return memory

    def with_unused(self, state_SBD: Tensor, name: str) -> Tensor:
        """Return the state, whose gradient also gives zero gradients to parameters that get none otherwise.

        These are NAME.c of the cycles or loops c from ``loops`` to K - 1, which fewer loops leave out, and of cycles
        without gradients. A distributed optimizer waits for gradients of all parameters.
        """
        own = {self.spec.own_cycle(cycle, self.loops) for cycle in range(self.cut + 1, self.loops + 1)}
        without = [cycle for cycle in range(1, self.cut + 1) if cycle not in own]
        unused = [*without, *range(max(self.loops, self.cut + 1), self.spec.loops)] if torch.is_grad_enabled() else ()
        weights = [weight for cycle in unused for weight in self.weights(f"{name}.{cycle}")]
        return with_zero_gradients(state_SBD, *weights) if weights else state_SBD


def with_zero_gradients(state: Tensor, *others: Tensor) -> Tensor:
    """Return ``state``, whose gradient also gives gradients of zero to ``others``."""
    return _ZeroGradients.apply(state, *others)


def without_graph(before_SBD: Tensor, after_SBD: Tensor) -> Tensor:
    """Return the state ``after_SBD``, computed without a graph from ``before_SBD``, whose gradient becomes zero.

    The backward pass still visits what came before: boundaries of the memory and the edges of a ring rely on it.
    """
    return _WithoutGraph.apply(before_SBD, after_SBD)


class _WithoutGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, before: Tensor, after: Tensor) -> Tensor:
        return after.view_as(after)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.zeros_like(gradient), None


class _ZeroGradients(torch.autograd.Function):
    """Identity on the state; its backward gives zeros to the others."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return gradient, *(torch.zeros_like(other) for other in ctx.saved_tensors)


def _submodule(module: nn.Module, path: Sequence[str]) -> nn.Module:
    """Return the submodule at ``path``; create what is missing, a list where numbers follow."""
    for depth, part in enumerate(path, start=1):
        if not hasattr(module, part):
            numbered = depth < len(path) and path[depth].isdigit()
            module.add_module(part, nn.ModuleList() if numbered else Weights())
        module = module.get_submodule(part)
    return module
