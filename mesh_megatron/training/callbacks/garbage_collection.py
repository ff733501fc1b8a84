"""Garbage collection on all ranks at once."""

from __future__ import annotations

import gc

from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer


class GarbageCollection(Callback):
    """Collect garbage on all ranks at once, so that no rank makes the others wait at a time of its own."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def start(self, trainer: Trainer) -> None:
        gc.disable()
        gc.collect()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.state.iteration % self.interval == 0:
            gc.collect()

    def finish(self, trainer: Trainer) -> None:
        gc.enable()
