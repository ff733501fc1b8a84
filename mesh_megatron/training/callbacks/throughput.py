"""How fast steps are: what evaluations, checkpoints and probes between them take is no part of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer


class StepClock(Callback):
    """Adds up ``trainer.step_seconds``. A step ends at its place among the callbacks, which is behind ``EarlyExit``:
    there all ranks have waited for their devices."""

    def before_step(self, trainer: Trainer) -> None:
        self._began = time.perf_counter()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        trainer.step_seconds += time.perf_counter() - self._began


@dataclass(frozen=True)
class Throughput:
    """Of some steps."""

    seconds_a_step: float
    tokens_per_second: float

    def seconds_to_end(self, trainer: Trainer) -> int:
        """Of the steps that are left alone."""
        return round((trainer.total_iters - trainer.state.iteration) * self.seconds_a_step)


class ThroughputMeter:
    """Measures the steps from one call of ``take`` to the next."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._mark()

    def take(self) -> Throughput:
        """The steps since the last call, of which there must be one."""
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
