"""Equations of recurrence schemes of public looped models: ``adapter``, ``decay``, ``hyper``, ``attend``.

``config/loop_schemes.py`` describes their parameters and costs. Shapes: S positions, B sequences, D channels, n lanes.
Weighted sums run in float32 and keep only their inputs for the backward pass, which computes them again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mesh_megatron.config.loop_schemes import HyperSpec
from mesh_megatron.config.scheme import SchemeSpec
from mesh_megatron.model.scheme import Memory, Scheme
from mesh_megatron.model.state_ops import keeping_inputs, normalised_product, product, weighted_sum
from mesh_megatron.model.transformer_config import MeshTransformerConfig

Numbers = tuple[Tensor, Tensor | None]
"""All lanes' numbers: the static part [n, numbers] and the dynamic part's matrix [numbers, D], if there is one."""
DYNAMIC_SCALE = 0.01


class Adapter(Scheme):
    """h(t+1) = W [f_core(h(t)), h_emb] + b; the half of h_emb is computed once."""

    def begin(self, embedding_SBD: Tensor) -> Memory:
        weight, bias = self.weights("adapter")
        width = embedding_SBD.shape[-1]
        return {"injected": product(embedding_SBD, weight[:, width:]) + bias.to(embedding_SBD.dtype)}

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        if cycle == 0:
            return output_SBD, memory
        weight, _ = self.weights("adapter")
        return product(output_SBD, weight[:, : output_SBD.shape[-1]]) + memory["injected"], memory


class Decay(Scheme):
    """h(t+1) = A * f_core(h(t)) + B h0 with A = sigmoid(a) per channel, B diagonal or a matrix."""

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        if cycle == 0:
            (weight,) = self.weights("injection")
            linear = weight.dim() == 2
            injected = product(output_SBD, weight) if linear else (output_SBD * weight).to(output_SBD.dtype)
            return output_SBD, {**memory, "injected": injected}
        (logit,) = self.weights("decay")
        return (logit.sigmoid() * output_SBD + memory["injected"]).to(output_SBD.dtype), memory


class Hyper(Scheme):
    """Hyper-connections between loops: n lanes, read before a loop, mixed and written to after it.

    Loops beyond K take the numbers of loop K - 1; the coda's read is its own whatever the number of loops.
    """

    def __init__(self, spec: SchemeSpec, config: MeshTransformerConfig) -> None:
        super().__init__(spec, config)
        assert isinstance(spec, HyperSpec)
        self.count = self.model.hyper_lanes
        self.epsilon = self.model.norm_epsilon

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        names = [f"lane{lane}" for lane in range(self.count)]
        if cycle == 0:
            output_SBD = self.with_unused(output_SBD, "lanes")
            state = keeping_inputs(self.read, self.numbers(0), *[output_SBD] * self.count)
            return state, {**memory, **dict.fromkeys(names, output_SBD)}
        state, *lanes = keeping_inputs(
            self.write_and_read, self.numbers(cycle - 1), self.numbers(cycle), output_SBD, *(memory[n] for n in names)
        )
        return state, {**memory, **dict(zip(names, lanes, strict=True))}

    def exit_state(self, cycle: int, next_SBD: Tensor, memory: Memory) -> Tensor:
        """Read the lanes as the coda does."""
        if cycle == self.loops:
            return next_SBD
        return keeping_inputs(self.read, self.numbers(self.loops), *(memory[f"lane{j}"] for j in range(self.count)))

    def numbers(self, loop: int) -> Numbers:
        """Return the numbers of ``loop``, or those of the coda's read after the last one."""
        bias, *weight = self.weights(f"lanes.{min(loop, self.spec.loops - 1)}" if loop < self.loops else "output")
        return bias.view(self.count, -1), weight[0] if weight else None

    def of_lane(self, numbers: Numbers, lane: int, state: Tensor, part: slice) -> Tensor:
        """Return ``part`` of a lane's (r, w, M_1..M_n): [numbers], or with a dynamic part [S, B, numbers]."""
        bias, weight = numbers
        if weight is None:
            return bias[lane, part]
        return bias[lane, part] + DYNAMIC_SCALE * normalised_product(state, weight[part], self.epsilon)

    def read(self, numbers: Numbers, *lanes: Tensor) -> Tensor:
        """Compute sum_j r_j l_j [S, B, D]."""
        shares = [self.of_lane(numbers, j, lane, slice(1))[..., 0] for j, lane in enumerate(lanes)]
        return weighted_sum(shares, lanes)

    def write_and_read(self, numbers: Numbers, next_numbers: Numbers, output: Tensor, *lanes: Tensor) -> list[Tensor]:
        """Compute the next state, then the lanes l_i := sum_j M_ij l_j + w_i y that it is read from."""
        of_lanes = [self.of_lane(numbers, j, lane, slice(1, None)) for j, lane in enumerate(lanes)]
        written = []
        for i in range(self.count):
            mixing, write = [mine[..., 1 + i] for mine in of_lanes], of_lanes[i][..., 0]
            written.append(weighted_sum([*mixing, write], [*lanes, output]))
        return [self.read(next_numbers, *written), *written]


class Attend(Scheme):
    """s_{c+1} = sum_i softmax_i(<q_c, v_i / rms(v_i)> + b_ci) v_i over the history v = (h_emb, y_0..y_c).

    With another number of loops than K, ``SchemeSpec.own_cycle`` says which query a cycle takes. Where several cycles
    take the same, the output of each replaces the one before it in the history.
    """

    def begin(self, embedding_SBD: Tensor) -> Memory:
        return {"embedding": self.with_unused(embedding_SBD, "queries")}

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        memory = {**memory, f"output{cycle}": output_SBD}
        return self.attended({self.spec.own_cycle(c, self.loops): c for c in range(cycle + 1)}, memory), memory

    def exit_state(self, cycle: int, next_SBD: Tensor, memory: Memory) -> Tensor:
        """Read the history by query K, which leads to the coda."""
        if cycle == self.loops:
            return next_SBD
        earlier = {self.spec.own_cycle(c, self.loops): c for c in range(cycle)}
        return self.attended({**earlier, self.spec.loops: cycle}, memory)

    def attended(self, cycles: Mapping[int, int], memory: Memory) -> Tensor:
        """Read h_emb and the outputs of ``cycles`` by the query of the last; keys are the cycles of their biases."""
        query, bias = self.weights(f"queries.{max(cycles)}")
        if len(cycles) + 1 < len(bias):
            bias = bias[[0, *(own + 1 for own in cycles)]]
        return keeping_inputs(
            self.read, query, bias, memory["embedding"], *(memory[f"output{cycle}"] for cycle in cycles.values())
        )

    def read(self, query: Tensor, bias: Tensor, *history: Tensor) -> Tensor:
        epsilon = self.model.norm_epsilon
        scores = torch.cat([normalised_product(state, query[None], epsilon) for state in history], dim=-1)
        return weighted_sum((scores + bias).softmax(-1).unbind(-1), history)
