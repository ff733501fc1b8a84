"""The speed of steps, excluding the evaluations, checkpoints and probes between them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer


class StepClock(Callback):
    """Accumulates ``trainer.step_seconds``.

    It must be listed after ``EarlyExit``, whose collective waits for the devices of all ranks: there a step ends.
    """

    def before_step(self, trainer: Trainer) -> None:
        self._began = time.perf_counter()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        trainer.step_seconds += time.perf_counter() - self._began


@dataclass(frozen=True)
class Throughput:
    """The mean speed of some steps, over all ranks."""

    seconds_a_step: float
    tokens_per_second: float

    def seconds_to_end(self, trainer: Trainer) -> int:
        """Return the seconds that the remaining steps will take, without evaluations and checkpoints."""
        return round((trainer.total_iters - trainer.state.iteration) * self.seconds_a_step)


class ThroughputMeter:
    """Measures the speed of the steps between two calls of ``take``."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._mark()

    def take(self) -> Throughput:
        """Return the speed of the steps since the last call; there must be at least one."""
        state = self._trainer.state
        seconds = self._trainer.step_seconds - self._seconds
        pace = Throughput(
            seconds / (state.iteration - self._iteration), (state.consumed_tokens - self._tokens) / seconds
        )
        self._mark()
        return pace

    def _mark(self) -> None:
        state = self._trainer.state
        self._seconds, self._iteration, self._tokens = (
            self._trainer.step_seconds, state.iteration, state.consumed_tokens
        )  # fmt: skip
