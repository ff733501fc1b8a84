"""Garbage collection on all ranks at the same step."""

from __future__ import annotations

import gc

from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer


class GarbageCollection(Callback):
    """Collects garbage every ``interval`` steps (0: never) on all ranks, so that they do not stall each other."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def start(self, trainer: Trainer) -> None:
        gc.disable()
        gc.collect()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if self.interval and trainer.state.iteration % self.interval == 0:
            gc.collect()

    def finish(self, trainer: Trainer) -> None:
        gc.enable()
