"""Recurrence schemes of public looped models, without torch: ``adapter``, ``decay``, ``hyper``, ``attend``.

``model/loop_schemes.py`` has their equations, docs/recurrence.md compares them. D is the hidden size, K the number of
loops, n the number of lanes. A product with a large matrix runs in the states' precision, everything else in float32.
"""

from __future__ import annotations

import math
from typing import Any

from mesh_megatron.config.scheme import FAVOURED, Parameter, SchemeSpec, StateSize

_DECAY = math.sqrt(1 / 5)
"""Decay per loop at the start, as in Parcae."""


class InjectionSpec(SchemeSpec):
    """h(t+1) = T(f_core(h(t))) + u, where u is one function of an earlier state and the same in all loops."""

    def boundary_traffic(self, cycle: int, value_bytes: int) -> tuple[float, float]:
        return (3, 6) if cycle > 0 else (2, 4)

    def history(self, chunk: int, size: StateSize) -> int:
        """Return the bytes of the cycle's output, or of u, which a ring passes along its chunks."""
        if chunk == 1:
            return size.state if size.on_ring else 0
        return size.state if chunk > 1 else 0


class AdapterSpec(InjectionSpec):
    """h(t+1) = W [f_core(h(t)), h_emb] + b with W [D, 2D] (Huginn, arXiv 2502.05171); starts at W = [I, 0]: base."""

    seen_in = "[Huginn](https://arxiv.org/abs/2502.05171)"

    def parameters(self) -> dict[str, Parameter]:
        hidden = self.model.hidden_size
        return {
            "adapter.weight": Parameter((hidden, 2 * hidden), start=1.0, at_base=1.0),
            "adapter.bias": Parameter((hidden,), start=(0.0,)),
        }

    def routing_macs(self) -> int:
        return (self.loops + 1) * self.model.hidden_size**2  # h_emb's half once


class DecaySpec(InjectionSpec):
    """h(t+1) = A * f_core(h(t)) + B h0 with A = sigmoid(a) in (0, 1) per channel (Parcae).

    Starts at A = sqrt(1/5) and B = 1 - A in every channel: ``static`` with these two as a1 and a2.
    """

    seen_in = "Parcae"

    @property
    def injects_prelude(self) -> bool:
        return True

    def settings(self) -> dict[str, Any]:
        return {"decay_input": self.model.decay_input}

    @property
    def _linear(self) -> bool:
        return self.model.decay_input == "linear"

    def parameters(self) -> dict[str, Parameter]:
        hidden = self.model.hidden_size

        def started(decay: float) -> tuple[tuple[float, ...], float | tuple[float, ...]]:
            return (math.log(decay / (1 - decay)),), 1 - decay if self._linear else (1 - decay,)

        (logit, injected), (base_logit, base_injected) = started(_DECAY), started(FAVOURED)
        shape = (hidden, hidden) if self._linear else (hidden,)
        return {
            "decay.logit": Parameter((hidden,), start=logit, at_base=base_logit),
            "injection.weight": Parameter(shape, start=injected, at_base=base_injected),
        }

    def routing_macs(self) -> int:
        return self.model.hidden_size**2 if self._linear else 0

    def mixing_macs(self) -> int:
        return self.model.hidden_size * (self.loops + (0 if self._linear else 1))


class HyperSpec(SchemeSpec):
    """Hyper-connections at the loop boundary (arXiv 2409.19606; at loops 2604.21106, 2604.21254): n lanes of state.

    All lanes l_1..l_n begin as h0. Loop t reads h = sum_j r_j l_j and writes l_i := sum_j M_ij l_j + w_i f_core(h); the
    coda reads the lanes too. Starts at r one-hot (lane t mod n), M = I, w = 1, and the mean for the coda: ``residual``.
    """

    seen_in = "[hyper-connections](https://arxiv.org/abs/2409.19606)"

    dynamic = False

    def settings(self) -> dict[str, Any]:
        return {"hyper_lanes": self.model.hyper_lanes}

    def parameters(self) -> dict[str, Parameter]:
        lanes, hidden = self.model.hyper_lanes, self.model.hidden_size
        found = {}
        for loop in range(self.loops):
            found[f"lanes.{loop}.bias"] = Parameter(
                (lanes * (lanes + 2),), start=self._bias(loop, 1.0), at_base=self._bias(loop, 0.0)
            )
        mean = (1 / lanes,)
        found["output.bias"] = Parameter((lanes,), start=mean, at_base=mean)
        if self.dynamic:
            zero: tuple[float, ...] = (0.0,)
            for loop in range(self.loops):
                found[f"lanes.{loop}.weight"] = Parameter((lanes + 2, hidden), start=zero)
            found["output.weight"] = Parameter((1, hidden), start=zero)
        return found

    def _bias(self, loop: int, kept: float) -> tuple[float, ...]:
        """Return a loop's [n, n + 2] numbers, a row per lane j: r_j, w_j, M_1j..M_nj; ``kept`` is M's diagonal."""
        lanes = self.model.hyper_lanes
        rows = [
            [float(lane == loop % lanes), 1.0] + [kept * (i == lane) for i in range(lanes)] for lane in range(lanes)
        ]
        return tuple(number for row in rows for number in row)

    def routing_macs(self) -> int:
        lanes = self.model.hyper_lanes
        return lanes * (self.loops * (lanes + 2) + 1) * self.model.hidden_size if self.dynamic else 0

    def mixing_macs(self) -> int:
        lanes = self.model.hyper_lanes
        return (lanes + self.loops * lanes * (lanes + 2)) * self.model.hidden_size

    def exit_macs(self) -> tuple[int, int]:
        of_reads = (self.loops - 1) * self.model.hyper_lanes * self.model.hidden_size
        return of_reads if self.dynamic else 0, of_reads

    @property
    def own_exits(self) -> bool:
        return True

    def boundary_traffic(self, cycle: int, value_bytes: int) -> tuple[float, float]:
        """Return the states of two weighted sums, the backward pass of which computes them again."""
        lanes = self.model.hyper_lanes
        forward = 2 if cycle == 0 else 3 * lanes + 2
        return forward, 3 * forward

    def history(self, chunk: int, size: StateSize) -> int:
        if chunk == 0:
            return 0
        return size.state * (1 + (self.model.hyper_lanes if 1 < chunk <= self.loops else 0))


class HyperDynamicSpec(HyperSpec):
    """The same with 0.01 V l_j / rms(l_j) added to each lane's numbers, per token; V [n + 2, D] starts at zero."""

    dynamic = True


class AttendSpec(SchemeSpec):
    """s_{c+1} = sum_i softmax_i(<q_c, k_i> + b_ci) v_i over the history v = (h_emb, y_0..y_c), k_i = v_i / rms(v_i).

    One query per cycle, as in attention residuals; queries and biases start at zero: the mean of the history.
    """

    seen_in = "attention residuals"

    @property
    def injects_prelude(self) -> bool:
        return True

    def parameters(self) -> dict[str, Parameter]:
        cycles = range(self.loops + 1)
        zero: tuple[float, ...] = (0.0,)
        queries = {f"queries.{cycle}.weight": Parameter((self.model.hidden_size,), start=zero) for cycle in cycles}
        biases = {
            f"queries.{cycle}.bias": Parameter((cycle + 2,), start=zero, at_base=self._favouring_last(cycle))
            for cycle in cycles
        }
        return queries | biases

    def _favouring_last(self, cycle: int) -> tuple[float, ...]:
        return (0.0,) * (cycle + 1) + (math.log(FAVOURED / (1 - FAVOURED) * (cycle + 1)),)

    def _reads(self) -> int:
        return (self.loops + 1) * (self.loops + 4) // 2  # cycle c reads h_emb and y_0..y_c

    def routing_macs(self) -> int:
        return self._reads() * self.model.hidden_size

    def mixing_macs(self) -> int:
        return self._reads() * self.model.hidden_size

    def exit_macs(self) -> tuple[int, int]:
        reads = sum(cycle + 2 for cycle in range(1, self.loops)) * self.model.hidden_size
        return reads, reads

    @property
    def own_exits(self) -> bool:
        return True

    def boundary_traffic(self, cycle: int, value_bytes: int) -> tuple[float, float]:
        """Return the states of the scores and of the sum, which the backward pass computes again."""
        forward = 2 * (cycle + 2) + 1
        return forward, 3 * forward

    def history(self, chunk: int, size: StateSize) -> int:
        return size.state if chunk > 0 else 0

    def deferred(self, size: StateSize) -> int:
        return size.state
