"""Predicted time of a step whose number of loops differs from step to step: the mean over the run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.compute import Time
from mesh_megatron.planning.hardware import Links
from mesh_megatron.planning.step_time import StepModel, StepTime


class MeanStep:
    """Step time of a run as ``StepModel`` predicts it, averaged over its numbers of loops (``--loops-sampling``)."""

    def __init__(self, run: RunConfig, vocabulary_rows: int, world_size: int, micro_batches: int, links: Links) -> None:
        self.run, self.micro_batches = run, micro_batches
        self._parts = [
            (share, StepModel(run.at_loops(loops), vocabulary_rows, world_size, micro_batches, links))
            for loops, share in run.loop_shares(world_size).items()
        ]

    @cached_property
    def least(self) -> float:
        """Lower bound of the mean step time under any schedule, in seconds."""
        return sum(share * step.least for share, step in self._parts)

    def simulated(self) -> StepTime:
        """Return the mean step time from a simulation of each number of loops."""
        return mean_time([(share, step.simulated()) for share, step in self._parts])


def mean_time(parts: Sequence[tuple[float, StepTime]]) -> StepTime:
    """Return the mean of step times by their shares of steps; the bubble is a share of the mean ring."""
    if len(parts) == 1:
        return parts[0][1]
    ring = sum(share * time.ring for share, time in parts)
    return StepTime(
        ring=ring,
        bubble=sum(share * time.ring * time.bubble for share, time in parts) / ring,
        busiest=sum((time.busiest * share for share, time in parts), start=Time()),
        gradients=sum(share * time.gradients for share, time in parts),
        optimizer=sum(share * time.optimizer for share, time in parts),
        weights=sum(share * time.weights for share, time in parts),
    )
