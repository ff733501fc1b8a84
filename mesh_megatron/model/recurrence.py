"""Recurrence schemes: state passing between loops of the core (Sections 3.1 and 3.2, Tables 4 and 6).

Here are the equations of the MeSH paper's schemes, on the base class of ``scheme.py``; ``loop_schemes.py`` has those
of other looped models. ``config/recurrence.py`` describes each scheme's parameters and its costs;
docs/architecture.md says how to add a scheme.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mesh_megatron.config.loop_schemes import AdapterSpec, AttendSpec, DecaySpec, HyperDynamicSpec, HyperSpec
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.recurrence import DynamicSpec, MeshSpec, StaticSpec, SumSpec, scheme_spec
from mesh_megatron.config.scheme import SchemeSpec
from mesh_megatron.model import memory_op
from mesh_megatron.model.loop_schemes import Adapter, Attend, Decay, Hyper
from mesh_megatron.model.memory import mix
from mesh_megatron.model.memory_op import DeferredGradients, next_state, resolve_memory_kernel, route
from mesh_megatron.model.router_losses import Coefficients, with_losses
from mesh_megatron.model.scheme import Memory, Scheme
from mesh_megatron.model.transformer_config import MeshTransformerConfig


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

    def __init__(self, spec: SchemeSpec, config: MeshTransformerConfig) -> None:
        super().__init__(spec, config)
        sharing = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.share_of_tokens = 1 / (sharing * config.context_parallel_size)
        self.coefficients = Coefficients(self.model.router_z_loss, self.model.router_entropy_loss)

    def begin(self, embedding_SBD: Tensor) -> Memory:
        kernel = resolve_memory_kernel(self.model.memory_kernel, embedding_SBD.device)
        if torch.is_grad_enabled() and self.loops > self.spec.loops:  # boundaries would not find their own gradients
            raise ValueError(f"training runs at most the {self.spec.loops} loops of --layout, not {self.loops}")
        embedding_SBD = self.with_unused(embedding_SBD, "routers")
        router = self.router(0)
        routing = route(embedding_SBD, *router, kernel=kernel)
        routing = with_losses(routing, embedding_SBD, router, self.coefficients, self.share_of_tokens)
        return {"embedding": embedding_SBD, "routing0": routing, "deferred": DeferredGradients()}

    def enter(self, cycle: int, state_SBD: Tensor, memory: Memory) -> Memory:
        """Add what ``exit_state`` needs of the state: the routing with which ``cycle`` would lead to the coda."""
        if not self.has_exits or not 0 < cycle < self.loops:
            return memory
        kernel = resolve_memory_kernel(self.model.memory_kernel, state_SBD.device)
        return {**memory, "exit_routing": route(state_SBD, *self.router(self.loops), kernel=kernel)}

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        memory = {**memory, f"output{cycle}": output_SBD}
        cycles = list({self.spec.own_cycle(c, self.loops): c for c in range(cycle + 1)}.values())
        router = self.router(cycle + 1) if cycle < self.loops else None
        state, routing = next_state(
            [memory["embedding"], *(memory[f"output{i}"] for i in cycles)],
            [memory[f"routing{i}"] for i in cycles],
            router,
            deferred=memory["deferred"],
            kernel=resolve_memory_kernel(self.model.memory_kernel, output_SBD.device),
        )
        if router is None or routing is None:
            return state, memory
        routing = with_losses(routing, state, router, self.coefficients, self.share_of_tokens)
        return state, {**memory, f"routing{cycle + 1}": routing}

    def exit_state(self, cycle: int, next_SBD: Tensor, memory: Memory) -> Tensor:
        """Read the memory by router K, which leads to the coda, from the state that entered ``cycle``.

        Autograd adds these gradients to those of the boundaries: each block's backward pass waits for both.
        """
        if cycle == self.loops:
            return next_SBD
        last_write, read = memory["exit_routing"].chunk(2, -1)
        earlier = list({self.spec.own_cycle(c, self.loops): c for c in range(cycle)}.values())
        writes = [memory[f"routing{i}"].chunk(2, -1)[0] for i in earlier] + [last_write]
        return mix([memory["embedding"], *(memory[f"output{i}"] for i in [*earlier, cycle])], writes, read)

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


EQUATIONS: Mapping[type[SchemeSpec], type[Scheme]] = {
    SchemeSpec: Scheme,
    SumSpec: Sum,
    StaticSpec: Static,
    DynamicSpec: Dynamic,
    MeshSpec: Mesh,
    AdapterSpec: Adapter,
    DecaySpec: Decay,
    HyperSpec: Hyper,
    HyperDynamicSpec: Hyper,
    AttendSpec: Attend,
}


def build_scheme(model: ModelConfig, config: MeshTransformerConfig) -> Scheme:
    """Build the scheme that ``--recurrence`` names."""
    spec = scheme_spec(model)
    return EQUATIONS[type(spec)](spec, config)
