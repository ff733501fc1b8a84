"""Recurrence schemes without torch: their parameters and initial values, their costs, and what they keep as history.

A scheme is one class here and one class in ``model/recurrence.py``, which has its equation. Everything that only needs
numbers (initial weights, plans, export, import) asks the class here. docs/architecture.md says how to add a scheme.
Here are the schemes of the MeSH paper; ``loop_schemes.py`` has those of other looped models.

D is the hidden size, K the number of loops, M the number of memory slots. Cycle 0 is the prelude, cycle c is loop
c - 1; chunk c of a pipeline begins with the state that enters cycle c.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mesh_megatron.config.loop_schemes import AdapterSpec, AttendSpec, DecaySpec, HyperDynamicSpec, HyperSpec
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.scheme import FAVOURED, FLOAT32, Parameter, SchemeSpec, StateSize

_MESH = "[MeSH](https://arxiv.org/abs/2510.07739)"


class SumSpec(SchemeSpec):
    """h(t+1) = f_core(h(t)) plus any of h(t) (residual), h0 (anchor) and h_emb (anchor_emb), as in Table 4."""

    seen_in = _MESH

    @property
    def terms(self) -> list[str]:
        return self.model.scheme.split("+")

    @property
    def injects_prelude(self) -> bool:
        return "anchor" in self.terms

    def boundary_traffic(self, cycle: int, value_bytes: int) -> tuple[float, float]:
        sources = 1 + len(self.terms)
        return (sources + 1, 2 * sources) if cycle > 0 else (0, 0)

    def history(self, chunk: int, size: StateSize) -> int:
        """Return what the schedule keeps of a ring's received tensor: a sum itself keeps no operand."""
        return size.state if chunk > 1 and size.on_ring else 0


class StaticSpec(SchemeSpec):
    """h(t+1) = a1 f_core(h(t)) + a2 h0 + a3 h_emb with three trained scalars, shared by all loops (Table 4)."""

    seen_in = _MESH

    def parameters(self) -> dict[str, Parameter]:
        return {"coefficients": Parameter((3,), start=(1.0, 0.0, 0.0), at_base=(1.0, 0.0, 0.0))}

    @property
    def injects_prelude(self) -> bool:
        return True

    def mixing_macs(self) -> int:
        return 3 * self.model.hidden_size * self.loops

    def boundary_traffic(self, cycle: int, value_bytes: int) -> tuple[float, float]:
        return (4, 6) if cycle > 0 else (0, 0)

    def history(self, chunk: int, size: StateSize) -> int:
        return size.state if chunk > 1 else 0  # the prelude's output is the first state


class DynamicSpec(StaticSpec):
    """The same with coefficients per token, a linear function of the state that enters the core (Table 4)."""

    def parameters(self) -> dict[str, Parameter]:
        bias = Parameter((3,), start=(1.0, 0.0, 0.0), at_base=(1.0, 0.0, 0.0))
        weight = Parameter((3, self.model.hidden_size), std=self.model.router_init_std)
        return {"router.weight": weight, "router.bias": bias}

    def routing_macs(self) -> int:
        return 3 * self.model.hidden_size * self.loops

    def history(self, chunk: int, size: StateSize) -> int:
        if chunk < 2:
            return 0
        in_float32 = size.float32(size.hidden) if size.value_bytes < FLOAT32 else 0
        return size.state + in_float32 + size.float32(3)


class MeshSpec(SchemeSpec):
    """Memory-as-State-Highways (Section 3.2) in the form without slots; ``--memory-kernel slots`` stores them."""

    seen_in = _MESH

    @property
    def injects_prelude(self) -> bool:
        return True

    def validate(self) -> None:
        """Accept every setting: mesh has them all."""

    def settings(self) -> dict[str, Any]:
        names = "router_input", "router_gate", "router_temperature", "router_scale"
        return {"num_memory_slots": self.model.memory_slots} | {name: getattr(self.model, name) for name in names}

    def parameters(self) -> dict[str, Parameter]:
        model, slots, cycles = self.model, self.model.memory_slots, range(self.loops + 1)
        weight = Parameter((2 * slots, model.hidden_size), std=model.router_init_std)
        biases = {
            f"routers.{cycle}.bias": Parameter(
                (2 * slots,),
                start=self._bias(cycle, model.router_init, model.router_bias),
                at_base=self._bias(cycle, "base", self._near_one),
            )
            for cycle in cycles
        }
        found = {f"routers.{cycle}.weight": weight for cycle in cycles} | biases
        if model.router_scale is not None:
            scale = Parameter((1,), start=(model.router_scale,), at_base=(model.router_scale,))
            found |= {f"routers.{cycle}.scale": scale for cycle in cycles}
        return found

    @property
    def _near_one(self) -> float:
        """The bias with which a favoured slot's weight is ``FAVOURED``."""
        slots, odds = self.model.memory_slots, FAVOURED / (1 - FAVOURED)
        if self.model.router_gate == "sigmoid":
            return math.log(odds)
        return math.log(odds * (slots - 1)) if slots > 1 else 0.0

    def _bias(self, cycle: int, start: str, value: float) -> tuple[float, ...]:
        """Return the bias [2M] of a cycle's router, write slots before read slots, for ``--router-init`` ``start``.

        A favoured slot gets ``value``. The others get 0, or -``value`` where a sigmoid gate has to close them. Slot 0
        begins with h_emb; cycle c writes its output y_c to slot c+1, or every cycle to one slot: 1 for ``residual``,
        whose states are sums of outputs, and 0 for ``sum``, whose states are those and h_emb.
        """
        if start == "uniform":
            return (0.0,) * (2 * self.model.memory_slots)
        last = self.model.memory_slots - 1
        write = {"residual": 1, "sum": 0}.get(start, cycle + 1)
        reads = {write}
        if cycle > 0:  # the prelude's output is the first state of these schemes
            reads |= {"anchor": {1}, "anchor_emb": {0}}.get(start, set())
        favoured = [{min(write, last)}, {min(slot, last) for slot in reads}]
        other = -value if self.model.router_gate == "sigmoid" else 0.0
        return tuple(value if slot in half else other for half in favoured for slot in range(last + 1))

    def check_base_start(self) -> None:
        if self.model.memory_slots < self.loops + 2:
            raise ValueError(
                f"--num-memory-slots {self.model.memory_slots}: starting near the base recursion takes a slot for the "
                f"embedding and one for each of {self.loops + 1} cycles: use at least {self.loops + 2}"
            )

    def routing_macs(self) -> int:
        return (self.loops + 1) * 2 * self.model.memory_slots * self.model.hidden_size

    def mixing_macs(self) -> int:
        cycles = self.loops + 1
        written = cycles * (cycles + 1) // 2  # cycle c reads y_0..y_c
        # h_emb in each cycle, and <read, write>
        return (written + cycles) * self.model.hidden_size + written * self.model.memory_slots

    def exit_macs(self) -> tuple[int, int]:
        exits = self.loops - 1
        written = sum(cycle + 1 for cycle in range(1, self.loops))  # the exit of cycle c reads y_0..y_c
        hidden, slots = self.model.hidden_size, self.model.memory_slots
        return exits * 2 * slots * hidden, (written + exits) * hidden + written * slots

    def boundary_traffic(self, cycle: int, value_bytes: int) -> tuple[float, float]:
        if self._stores_slots:
            states = 2 * self.model.memory_slots * FLOAT32 / value_bytes
            return states, 2 * states
        return cycle + 3, cycle + 2 + 1 + (self.loops - cycle) + 1 + (cycle < self.loops)

    def history(self, chunk: int, size: StateSize) -> int:
        """Return the bytes of the previous cycle's output (or of the slots) and of this cycle's routing."""
        slots = self.model.memory_slots
        routing = size.float32(2 * slots)
        if self.model.router_input != "state":  # the norm's output, and its statistics per token
            statistics = 2 if self.model.router_input == "normalized" else 1
            routing += size.state + statistics * size.tokens * size.value_bytes
        if self.model.router_z_loss or self.model.router_entropy_loss:
            routing *= 2  # the gradient of the logits, and the norm again
        source = size.state
        if self._stores_slots:  # M slots in float32, and float32 copies of all that is written to them
            source = size.float32(size.hidden) * (slots + (1 if size.value_bytes == FLOAT32 else chunk))
        return (routing if chunk <= self.loops else 0) + (source if chunk > 0 else 0)

    @property
    def own_exits(self) -> bool:
        return True

    def exit_history(self, chunk: int, size: StateSize) -> int:
        """Return the bytes of a further routing, of a number per source, and of h_emb in float32 where it is not."""
        if not 2 <= chunk <= self.loops:
            return 0
        in_float32 = size.float32(size.hidden) if size.value_bytes < FLOAT32 else 0
        return size.float32(2 * self.model.memory_slots + chunk) + in_float32

    def deferred(self, size: StateSize) -> int:
        return 0 if self._stores_slots else size.state

    @property
    def _stores_slots(self) -> bool:
        return self.model.memory_kernel == "slots"


SCHEMES: Mapping[str, type[SchemeSpec]] = {
    "base": SchemeSpec,
    "residual": SumSpec,
    "anchor": SumSpec,
    "anchor_emb": SumSpec,
    "residual+anchor": SumSpec,
    "anchor+anchor_emb": SumSpec,
    "residual+anchor+anchor_emb": SumSpec,
    "static": StaticSpec,
    "dynamic": DynamicSpec,
    "mesh": MeshSpec,
    "adapter": AdapterSpec,
    "decay": DecaySpec,
    "hyper": HyperSpec,
    "hyper-dynamic": HyperDynamicSpec,
    "attend": AttendSpec,
}


def scheme_spec(model: ModelConfig) -> SchemeSpec:
    """Return the description of the scheme that ``--recurrence`` names."""
    return SCHEMES[model.scheme](model)


def scheme_settings(model: ModelConfig) -> dict[str, Any]:
    """Return the settings of all schemes, whichever scheme ``model`` has."""
    return {name: value for spec in SCHEMES.values() for name, value in spec(model).settings().items()}
