"""Validation and test loss during and after training."""

from __future__ import annotations

import logging
import math
import time

from mesh_megatron.training.callbacks.early_exit import EarlyExit
from mesh_megatron.training.metrics.writer import MetricsWriter
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer

logger = logging.getLogger(__name__)


class Evaluation(Callback):
    """Measures validation loss every ``--eval-interval`` steps, and validation and test loss after the last step.

    A request to stop interrupts an evaluation; it is repeated when the run continues.
    """

    def __init__(self, writer: MetricsWriter | None, exits: EarlyExit) -> None:
        self.writer, self.exits = writer, exits

    def start(self, trainer: Trainer) -> None:
        if trainer.state.evaluation_due:
            self.evaluate(trainer, by_clock=False)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        finished = trainer.state.iteration >= trainer.total_iters
        if finished or trainer.state.iteration % trainer.run.training.eval_interval == 0:
            self.evaluate(trainer)

    def evaluate(self, trainer: Trainer, by_clock: bool = True) -> None:
        """Measure and log the losses (nats per token) of this iteration; if interrupted, set ``evaluation_due``.

        With ``--eval-iters 0`` no evaluation is due, even if the checkpoint says so. ``by_clock`` lets the time limit
        interrupt too.
        """
        began = time.perf_counter()
        losses = self._losses(trainer, by_clock) if trainer.run.training.eval_iters else {}
        trainer.state.evaluation_due = losses is None
        if self.writer is None or not losses:
            return
        perplexities = {f"{tag} ppl": math.exp(min(loss, 20)) for tag, loss in losses.items()}
        recorded = perplexities if trainer.run.logging.log_validation_ppl_to_tensorboard else {}
        self.writer.write({"iteration": trainer.state.iteration, **losses, **recorded})
        if trainer.run.logging.log_timers_to_tensorboard:
            self.writer.plot({"iteration": trainer.state.iteration, "evaluate-time": time.perf_counter() - began})
        for (tag, loss), perplexity in zip(losses.items(), perplexities.values(), strict=True):
            logger.info(f"iteration {trainer.state.iteration:>8} | {tag} {loss:.4f} | perplexity {perplexity:.2f}")

    def _losses(self, trainer: Trainer, by_clock: bool) -> dict[str, float] | None:
        """Return the losses by tag, on every rank; None if interrupted."""
        streams = {
            "lm loss validation" if name == "validation" else f"lm loss validation {name}": stream
            for name, stream in trainer.data.valid.items()
        }
        finished = trainer.state.iteration >= trainer.total_iters or trainer.run.training.eval_only
        if finished and trainer.data.has_test:
            streams["lm loss test"] = trainer.data.test
        losses = {}
        for tag, stream in streams.items():
            stopping = trainer.stop_reason is not None
            loss = None if stopping else trainer.evaluate(stream, lambda: self.exits.interrupt(trainer, by_clock))
            if loss is None:
                return None
            losses[tag] = loss
        return losses
