"""Probes during training (``--probe-interval``): routers, norms of states, magnitudes of updates; see docs/probes.md.

A recurrence scheme is called at both ends of every cycle, so recording its arguments records the states between
blocks. In a pipeline the scheme runs on the first stage.
"""

from __future__ import annotations

from collections import defaultdict, deque

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mesh_megatron.model.recurrence import Memory, Scheme
from mesh_megatron.parallel.build_model import RankModel
from mesh_megatron.parallel.groups import on_first_stage, sequence_groups
from mesh_megatron.training.metrics.writer import MetricsWriter
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer


class MeshProbes(Callback):
    """Records the forward passes of every ``interval``-th step and logs their means."""

    def __init__(self, writer: MetricsWriter | None, interval: int) -> None:
        """``writer`` is None except on the rank that writes."""
        self.writer, self.interval = writer, interval
        self._watch: SchemeWatch | None = None

    def before_step(self, trainer: Trainer) -> None:
        if on_first_stage() and (trainer.state.iteration + 1) % self.interval == 0:
            self._watch = SchemeWatch(trainer.model.modules[0].recurrence)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        watch.end()
        if result.passed_over:  # on all ranks: there are no states to measure
            return
        numbers = global_means(watch, trainer.model)
        if self.writer is not None:
            self.writer.write({"iteration": trainer.state.iteration, **numbers})


class SchemeWatch:
    """Records the states that pass through a scheme, for each cycle and each micro-batch of B sequences.

    Recording lasts from construction to ``end``. Norms are kept as squares, which can be summed over ranks that each
    hold a shard of the sequences.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.squares: defaultdict[tuple[str, int], list[Tensor]] = defaultdict(list)
        """Squared Frobenius norms [B] of each micro-batch, by (name, cycle).

        ``state`` enters the cycle, ``output`` is what its block returns, ``change`` is output - state. The last
        ``state`` enters the coda.
        """
        self.means: defaultdict[str, list[Tensor]] = defaultdict(list)
        """Router statistics by log key, one number for each micro-batch."""
        self._scheme, self._enter, self._leave = scheme, scheme.enter, scheme.leave
        self._entered: defaultdict[int, deque[Tensor]] = defaultdict(deque)  # first in, first out
        object.__setattr__(scheme, "enter", self.enter)  # these replace the scheme's methods until ``end``
        object.__setattr__(scheme, "leave", self.leave)

    def end(self) -> None:
        """Restore the methods of the scheme."""
        object.__delattr__(self._scheme, "enter")
        object.__delattr__(self._scheme, "leave")

    def enter(self, cycle: int, state_SBD: Tensor, memory: Memory) -> Memory:
        self._entered[cycle].append(state_SBD.detach())
        return self._enter(cycle, state_SBD, memory)

    def leave(self, cycle: int, output_SBD: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        next_state_SBD, after = self._leave(cycle, output_SBD, memory)
        with torch.no_grad():
            state_SBD = self._entered[cycle].popleft()
            if cycle == 0:
                self._note_norm("state", 0, state_SBD)
            self._note_norm("output", cycle, output_SBD)
            self._note_norm("change", cycle, output_SBD - state_SBD)
            self._note_norm("state", cycle + 1, next_state_SBD)
            if f"routing{cycle}" in memory:
                self._note_routing(cycle, memory[f"routing{cycle}"])
        return next_state_SBD, after

    def _note_norm(self, name: str, cycle: int, x_SBD: Tensor) -> None:
        norm_B = torch.linalg.vector_norm(x_SBD, dim=(0, 2), dtype=torch.float64)
        self.squares[name, cycle].append(norm_B.square())

    def _note_routing(self, cycle: int, routing: Tensor) -> None:
        """Record means and entropies; ``routing`` holds write and read weights (w, r) as [S, B, 2M].

        An entropy is that of the weights divided by their sum, which is 1 already unless gates are sigmoids.
        """
        for name, weights in zip(("write", "read"), routing.double().chunk(2, -1), strict=True):
            for slot, mean in enumerate(weights.mean((0, 1))):
                self.means[f"router {name}/cycle {cycle} slot {slot}"].append(mean)
            shares = weights / weights.sum(-1, keepdim=True)
            self.means[f"router {name} entropy/cycle {cycle}"].append(torch.special.entr(shares).sum(-1).mean())


def global_means(watch: SchemeWatch, model: RankModel) -> dict[str, float]:
    """Return means over the sequences of the step by log key, the same on all ranks of the first stage (collective)."""
    shard_groups = sequence_groups(model.config)
    squares = torch.stack([torch.stack(of_batches) for of_batches in watch.squares.values()])
    for group in shard_groups:
        dist.all_reduce(squares, group=group)
    norms = dict(zip(watch.squares, squares.sqrt(), strict=True))  # [micro-batches, B] each
    cycles = max(cycle for _, cycle in norms)
    means: dict[str, Tensor] = {}
    for cycle in range(cycles + 1):
        name = "h_emb" if cycle == 0 else f"h({cycle - 1})"
        means[f"state norm/{name}"] = norms["state", cycle].mean() / model.seq_length**0.5
    for cycle in range(cycles):
        name = "prelude" if cycle == 0 else f"loop {cycle - 1}"
        sizes = norms["state", cycle] + norms["output", cycle]
        means[f"update magnitude/{name}"] = (2 * norms["change", cycle] / sizes).mean()
    means |= {name: torch.stack(of_batches).mean() for name, of_batches in watch.means.items()}
    values = torch.stack(list(means.values()))
    for group in [*shard_groups, parallel_state.get_data_parallel_group()]:
        dist.all_reduce(values, group=group)
        values /= group.size()
    return dict(zip(means, values.tolist(), strict=True))
