"""The record of every step in metrics.jsonl, and the lines and plotted points every ``--log-interval`` steps."""

from __future__ import annotations

import datetime
import functools
import logging
import math
import statistics
from collections.abc import Callable

from mesh_megatron.platform import device
from mesh_megatron.training.callbacks.throughput import Throughput, ThroughputMeter
from mesh_megatron.training.metrics.writer import MetricsWriter
from mesh_megatron.training.optimizer import learning_rate
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer

logger = logging.getLogger(__name__)


class Logging(Callback):
    """Writes a record of every step; every ``--log-interval`` steps it also prints a line and plots a point.

    Line and point hold the mean loss and speed of the steps since the last line. Steps without an update are always
    printed.
    """

    def __init__(self, writer: MetricsWriter | None, flops_per_token: Callable[[int], float]) -> None:
        """``writer`` is None except on the rank that writes; ``flops_per_token`` takes the number of loops."""
        self.writer, self.flops_per_token = writer, functools.cache(flops_per_token)
        self._losses: list[float] = []
        self._flops: list[float] = []

    def start(self, trainer: Trainer) -> None:
        self._step, self._interval = ThroughputMeter(trainer), ThroughputMeter(trainer)

    def before_step(self, trainer: Trainer) -> None:
        self._loss_scale = trainer.optimizer.get_loss_scale()  # the step may change it; float() would wait for the GPU

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        pace = self._step.take()
        if self.writer is None or result.passed_over:
            return
        state, flops = trainer.state, self.flops_per_token(trainer.model.loops)
        self._flops.append(flops)
        record: dict[str, float] = {
            "iteration": state.iteration,
            "consumed tokens": state.consumed_tokens,
            "lm loss": result.loss,
            **result.exits,
            **result.auxiliary_losses,
            "grad-norm": result.update.grad_norm,
            **result.measures,
            "learning-rate": learning_rate(trainer.optimizer),
            **self._speeds(pace, flops),
            **({"loops": trainer.model.loops} if trainer.run.loops.sampled else {}),
            "skipped iterations": state.skipped_steps,
            "nan iterations": state.nan_steps,
            "spike iterations": state.spike_steps,
        }
        if math.isfinite(result.loss):
            self._losses.append(result.loss)
        due = state.iteration % trainer.run.logging.log_interval == 0 or trainer.done
        reported = due or not result.update.applied
        if reported:
            record["loss-scale"] = self._loss_scale.item()  # waits for the GPU, so not in every step
            if device.has_gpu():
                record["peak memory GiB"] = device.peak_memory() / 2**30
        self.writer.note(record)
        if reported:
            self._report(trainer, self.writer, record)

    def _report(self, trainer: Trainer, writer: MetricsWriter, record: dict[str, float]) -> None:
        """Plot and print the record, with loss and speeds replaced by their means since the last report."""
        pace = self._interval.take()
        loss = statistics.fmean(self._losses) if self._losses else math.nan
        means = record | {"lm loss": loss} | self._speeds(pace, statistics.fmean(self._flops))
        self._losses.clear()
        self._flops.clear()
        writer.plot(means)
        loops = f"loops {record['loops']} | " if "loops" in record else ""
        exits = f"exit loop {record['exit loop']:.2f} | " if "exit loop" in record else ""
        memory = f"{means['peak memory GiB']:.1f} GiB | " if "peak memory GiB" in means else ""
        logger.info(
            f"iteration {trainer.state.iteration:>8}/{trainer.total_iters} | "
            f"tokens {means['consumed tokens']:.3e} | {loops}lm loss {loss:.4f} | {exits}"
            f"grad norm {means['grad-norm']:.3f} | "
            f"lr {means['learning-rate']:.2e} | {pace.seconds_a_step:.3f} s/step | "
            f"{pace.tokens_per_second:,.0f} tokens/s | {means['TFLOP/s per rank']:.3f} TFLOP/s/rank | {memory}"
            f"skipped {means['skipped iterations']} | nan {means['nan iterations']} | "
            f"ETA {datetime.timedelta(seconds=pace.seconds_to_end(trainer))}"
        )

    def _speeds(self, pace: Throughput, flops_per_token: float) -> dict[str, float]:
        return {
            "iteration-time": pace.seconds_a_step,
            "tokens per second": pace.tokens_per_second,
            "TFLOP/s per rank": pace.tokens_per_second * flops_per_token / device.world_size() / 1e12,
        }
