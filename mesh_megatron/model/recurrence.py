"""Recurrence schemes: state passing between loops of the core (Sections 3.1 and 3.2, Tables 4 and 6).

Cycle 0 is the prelude, cycles 1..K are the loops of the core. A scheme is called at the start and the end of
every cycle. Between calls it keeps its data in a ``Memory``, a plain mapping of names to tensors (and to objects
outside of the graph). It does not depend on layers or ranks; a pipeline passes the mapping from chunk to chunk.

Here are the equations. ``config/recurrence.py`` describes each scheme's parameters, which ``Scheme`` creates, and its
costs; docs/architecture.md says how to add a scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mesh_megatron.config.loops import loops_without_gradients
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.recurrence import DynamicSpec, MeshSpec, SchemeSpec, StaticSpec, SumSpec, scheme_spec
from mesh_megatron.model import memory_op
from mesh_megatron.model.memory_op import DeferredGradients, next_state, resolve_memory_kernel, route
from mesh_megatron.model.norm import mark_sequence_parallel
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
        self.config = config
        self.spec, self.model = spec, spec.model
        self.loops = spec.loops
        """Number of loops that the model runs now; the parameters are those of ``spec.loops``."""
        for name, parameter in spec.parameters().items():
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

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Compute the next state s_{cycle+1} [S, B, D] from the block's output, and update the memory."""
        return output_SBD, memory

    def resume(self, cycle: int, state_SBD: Tensor, memory: Memory) -> Memory:
        """Update the memory where gradients begin again: ``state_SBD`` enters ``cycle``, the first with gradients.

        The cycles from 1 on before it ran without gradients; parameters that they took for ``cycle`` have none either.
        """
        return memory


class Sum(Scheme):
    """h(t+1) = f_core(h(t)) plus any of h(t) (residual), h0 (anchor) and h_emb (anchor_emb), as in Table 4."""

    @property
    def terms(self) -> list[str]:
        assert isinstance(self.spec, SumSpec)
        return self.spec.terms

    def begin(self, embedding_SBD: Tensor) -> Memory:
        return {"anchor_emb": embedding_SBD} if "anchor_emb" in self.terms else {}

    def enter(self, cycle: int, state_SBD: Tensor, memory: Memory) -> Memory:
        return {**memory, "residual": state_SBD} if "residual" in self.terms and cycle > 0 else memory

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        if cycle == 0:
            return output_SBD, {**memory, "anchor": output_SBD} if "anchor" in self.terms else memory
        state = output_SBD
        for term in self.terms:
            state = state + memory[term]
        return state, memory


class Weighted(Scheme):
    """h(t+1) = a1 f_core(h(t)) + a2 h0 + a3 h_emb; starts at a = (1, 0, 0), which is ``base``."""

    def begin(self, embedding_SBD: Tensor) -> Memory:
        return {"embedding": embedding_SBD}

    def combine(self, coefficients: Tensor, output_SBD: Tensor, memory: Memory) -> Tensor:
        """Compute the weighted sum in float32; ``coefficients`` is [..., 3]."""
        a1, a2, a3 = coefficients.unsqueeze(-1).unbind(-2)
        state = a1 * output_SBD + a2 * memory["anchor"] + a3 * memory["embedding"]
        return state.to(output_SBD.dtype)


class Static(Weighted):
    """Three trainable scalars, shared by all loops (Table 4, static)."""

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        if cycle == 0:
            return output_SBD, {**memory, "anchor": output_SBD}
        (coefficients,) = self.weights()
        return self.combine(coefficients, output_SBD, memory), memory


class Dynamic(Weighted):
    """Coefficients per token, a linear function of the state that enters the core (Table 4, dynamic)."""

    def enter(self, cycle: int, state_SBD: Tensor, memory: Memory) -> Memory:
        return memory if cycle == 0 else {**memory, "coefficients": self.coefficients(state_SBD)}

    def coefficients(self, state_SBD: Tensor) -> Tensor:
        """Compute W s + b per token, [S, B, 3]."""
        weight, bias = self.weights("router")
        return F.linear(state_SBD.to(weight.dtype), weight, bias)

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        if cycle == 0:
            return output_SBD, {**memory, "anchor": output_SBD}
        memory = dict(memory)
        return self.combine(memory.pop("coefficients"), output_SBD, memory), memory


class Mesh(Scheme):
    """Memory-as-State-Highways (Section 3.2), in the form without slots.

    Every slot is a linear combination of h_emb and the outputs y_i, so the next state is one too:
    s_{c+1} = r_0 h_emb + sum_{i<=c} <r, w_i> y_i. Here (w, r) = gate((a W x + b) / T) over 2 x M slots; each cycle's
    router computes them from x, the state that enters the cycle or a norm of it. In the paper the gate is a softmax
    and a = T = 1. The memory keeps per cycle its output (which the backward pass keeps anyway) and its routing (w, r),
    computed with the state at the end of the previous cycle (``memory_op.py``).

    With another number of loops than K, ``SchemeSpec.own_cycle`` says which router a cycle takes. Beyond K loops
    several cycles take the same router: each replaces what the one before it wrote, so that the memory holds as many
    outputs as in training.
    """

    def begin(self, embedding_SBD: Tensor) -> Memory:
        kernel = resolve_memory_kernel(self.model.memory_kernel, embedding_SBD.device)
        if torch.is_grad_enabled():
            embedding_SBD = self._with_unused_routers(embedding_SBD)
        routing = route(embedding_SBD, *self.router(0), kernel=kernel)
        return {"embedding": embedding_SBD, "routing0": routing, "deferred": DeferredGradients()}

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        memory = {**memory, f"output{cycle}": output_SBD}
        cycles = list({self.spec.own_cycle(c, self.loops): c for c in range(cycle + 1)}.values())
        state, routing = next_state(
            [memory["embedding"], *(memory[f"output{i}"] for i in cycles)],
            [memory[f"routing{i}"] for i in cycles],
            self.router(cycle + 1) if cycle < self.loops else None,
            deferred=memory["deferred"],
            kernel=resolve_memory_kernel(self.model.memory_kernel, output_SBD.device),
        )
        return state, memory if routing is None else {**memory, f"routing{cycle + 1}": routing}

    def resume(self, cycle: int, state_SBD: Tensor, memory: Memory) -> Memory:
        """Compute the routing of ``cycle`` again, with gradients; that of cycle 1 has a graph, from cycle 0."""
        kernel = resolve_memory_kernel(self.model.memory_kernel, state_SBD.device)
        memory = {**memory, "routing1": memory["routing1"].detach()}
        return {**memory, f"routing{cycle}": route(state_SBD, *self.router(cycle), kernel=kernel)}

    def router(self, cycle: int) -> memory_op.RouterWeights:
        """Return a cycle's router with its scale a and temperature T multiplied into [2M, D] and [2M] numbers."""
        weight, bias, *scale = self.weights(f"routers.{self.spec.own_cycle(cycle, self.loops)}")
        temperature = self.model.router_temperature
        if scale:
            weight = weight * scale[0]
        if temperature != 1:
            weight, bias = weight / temperature, bias / temperature
        return memory_op.RouterWeights(weight, bias, self.model.router_input, self.model.router_gate)

    def _with_unused_routers(self, state_SBD: Tensor) -> Tensor:
        """Return the state, whose gradient also gives zero gradients to the routers that get none otherwise.

        A distributed optimizer waits for the gradient of every parameter. Raises ``ValueError`` beyond K loops, where
        boundaries would not find their own gradients.
        """
        if self.loops > self.spec.loops:
            raise ValueError(f"training runs at most the {self.spec.loops} loops of --layout, not {self.loops}")
        used = {self.spec.own_cycle(cycle, self.loops) for cycle in (0, *range(self.cut + 1, self.loops + 1))}
        unused = [cycle for cycle in range(self.spec.loops + 1) if cycle not in used]
        weights = [weight for cycle in unused for weight in self.weights(f"routers.{cycle}")]
        return _ZeroGradients.apply(state_SBD, *weights) if weights else state_SBD


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
    """Identity on the state; its backward gives zeros to the parameters."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def _submodule(module: nn.Module, path: Sequence[str]) -> nn.Module:
    """Return the submodule at ``path``; create what is missing, a list where numbers follow."""
    for depth, part in enumerate(path, start=1):
        if not hasattr(module, part):
            numbered = depth < len(path) and path[depth].isdigit()
            module.add_module(part, nn.ModuleList() if numbered else Weights())
        module = module.get_submodule(part)
    return module


EQUATIONS: Mapping[type[SchemeSpec], type[Scheme]] = {
    SchemeSpec: Scheme,
    SumSpec: Sum,
    StaticSpec: Static,
    DynamicSpec: Dynamic,
    MeshSpec: Mesh,
}


def build_scheme(model: ModelConfig, config: MeshTransformerConfig) -> Scheme:
    """Build the scheme that ``--recurrence`` names."""
    spec = scheme_spec(model)
    return EQUATIONS[type(spec)](spec, config)
