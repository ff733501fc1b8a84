"""Recurrence schemes: state passing between loops of the core (Sections 3.1 and 3.2, Tables 4 and 6).

Cycle 0 is the prelude, cycles 1..K are the loops of the core. A scheme is called at the start and the end of
every cycle. Between calls it keeps its data in a ``Memory``, a plain mapping of names to tensors (and to objects
outside of the graph). It does not depend on layers or ranks; a pipeline passes the mapping from chunk to chunk.

To add a scheme: one class with ``enter`` and ``leave``, one row in ``SCHEMES``, one test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.model import memory_op
from mesh_megatron.model.memory_op import DeferredGradients, next_state, resolve_memory_kernel, route
from mesh_megatron.model.norm import mark_sequence_parallel

Memory = Mapping[str, Any]


class Scheme(nn.Module):
    """The base recursion, h(t+1) = f_core(h(t)): the output of a cycle is the next state."""

    def begin(self, embedding_SBD: Tensor) -> Memory:
        """Return the memory before cycle 0, from the scaled embedding h_emb [S, B, D]."""
        return {}

    def enter(self, cycle: int, state_SBD: Tensor, memory: Memory) -> Memory:
        """Update the memory with the state [S, B, D] that enters the block of ``cycle``."""
        return memory

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Compute the next state s_{cycle+1} [S, B, D] from the block's output, and update the memory."""
        return output_SBD, memory


class Sum(Scheme):
    """h(t+1) = f_core(h(t)) plus any of h(t) (residual), h0 (anchor) and h_emb (anchor_emb), as in Table 4."""

    def __init__(self, *terms: str) -> None:
        super().__init__()
        self.terms = terms

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

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.empty(3, dtype=torch.float32))
        mark_sequence_parallel(self, config)

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        if cycle == 0:
            return output_SBD, {**memory, "anchor": output_SBD}
        return self.combine(self.coefficients, output_SBD, memory), memory


class Dynamic(Weighted):
    """Coefficients per token, a linear function of the state that enters the core (Table 4, dynamic)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.router = Router(config, 3)

    def enter(self, cycle: int, state_SBD: Tensor, memory: Memory) -> Memory:
        return memory if cycle == 0 else {**memory, "coefficients": self.coefficients(state_SBD)}

    def coefficients(self, state_SBD: Tensor) -> Tensor:
        """Compute W s + b per token, [S, B, 3]."""
        weight, bias = self.router()
        return F.linear(state_SBD.to(weight.dtype), weight, bias)

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        if cycle == 0:
            return output_SBD, {**memory, "anchor": output_SBD}
        memory = dict(memory)
        return self.combine(memory.pop("coefficients"), output_SBD, memory), memory


class Router(nn.Module):
    """Weight [outputs, D] and bias [outputs] of a linear map from a state to numbers per token, always in float32.

    Call the module to get them, so that its hooks run: a distributed optimizer gathers parameters there.
    """

    def __init__(self, config: TransformerConfig, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, config.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=torch.float32))
        mark_sequence_parallel(self, config)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias


class Mesh(Scheme):
    """Memory-as-State-Highways (Section 3.2), in the form without slots.

    Every slot is a linear combination of h_emb and the outputs y_i, so the next state is one too:
    s_{c+1} = r_0 h_emb + sum_{i<=c} <r, w_i> y_i. Here w and r are softmaxes over M slots; each cycle's router computes
    them from the state that enters the cycle. The memory keeps per cycle its output (which the backward pass keeps
    anyway) and its routing (w, r), computed with the state at the end of the previous cycle (``memory_op.py``).
    """

    def __init__(
        self, config: TransformerConfig, loops: int, slots: int, normalize_input: bool = False, kernel: str = "auto"
    ) -> None:
        super().__init__()
        self.normalize_input, self.kernel = normalize_input, kernel
        self.routers = nn.ModuleList(Router(config, 2 * slots) for _ in range(loops + 1))

    def begin(self, embedding_SBD: Tensor) -> Memory:
        kernel = resolve_memory_kernel(self.kernel, embedding_SBD.device)
        routing = route(embedding_SBD, *self.router(0), kernel=kernel)
        return {"embedding": embedding_SBD, "routing0": routing, "deferred": DeferredGradients()}

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        memory = {**memory, f"output{cycle}": output_SBD}
        cycles = range(cycle + 1)
        state, routing = next_state(
            [memory["embedding"], *(memory[f"output{i}"] for i in cycles)],
            [memory[f"routing{i}"] for i in cycles],
            self.router(cycle + 1) if cycle + 1 < len(self.routers) else None,
            deferred=memory["deferred"],
            kernel=resolve_memory_kernel(self.kernel, output_SBD.device),
        )
        return state, memory if routing is None else {**memory, f"routing{cycle + 1}": routing}

    def router(self, cycle: int) -> memory_op.RouterWeights:
        weight, bias = self.routers[cycle]()
        return memory_op.RouterWeights(weight, bias, self.normalize_input)


SCHEMES = {
    "base": lambda model, config: Scheme(),
    "residual": lambda model, config: Sum("residual"),
    "anchor": lambda model, config: Sum("anchor"),
    "anchor_emb": lambda model, config: Sum("anchor_emb"),
    "residual+anchor": lambda model, config: Sum("residual", "anchor"),
    "anchor+anchor_emb": lambda model, config: Sum("anchor", "anchor_emb"),
    "residual+anchor+anchor_emb": lambda model, config: Sum("residual", "anchor", "anchor_emb"),
    "static": lambda model, config: Static(config),
    "dynamic": lambda model, config: Dynamic(config),
    "mesh": lambda model, config: Mesh(
        config, model.segments.loops, model.memory_slots, model.router_input == "normalized", model.memory_kernel
    ),
}


def build_scheme(model: ModelConfig, config: TransformerConfig) -> Scheme:
    """Build the scheme that ``--recurrence`` names."""
    return SCHEMES[model.scheme](model, config)
