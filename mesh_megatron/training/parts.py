"""What happens around the steps: logging, evaluation, leaving early, checkpoints, profiles."""

from __future__ import annotations

import datetime
import gc
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.utils import configure_nvtx_profiling

from mesh_megatron.config.run import RunConfig
from mesh_megatron.platform import device
from mesh_megatron.training.agreement import largest
from mesh_megatron.training.anomalies import weights_are_finite
from mesh_megatron.training.checkpoint import Checkpointer
from mesh_megatron.training.checkpoint_folder import SaveFailed
from mesh_megatron.training.loop import Part, Trainer
from mesh_megatron.training.metrics import MetricsWriter
from mesh_megatron.training.optimizer import learning_rate
from mesh_megatron.training.pace import Pace, Pacer
from mesh_megatron.training.run_status import WRONG_NUMBERS_EXIT_CODE
from mesh_megatron.training.signals import SignalListener
from mesh_megatron.training.step import StepResult


class Logging(Part):
    """Every step's record, and every ``--log-interval`` steps and for a step that was skipped a line and a point in
    the figures, with the mean loss and speed of the steps since the last one."""

    def __init__(self, writer: MetricsWriter | None, flops_per_token: float) -> None:
        """``writer`` on the rank that writes, None on the others."""
        self.writer, self.flops_per_token = writer, flops_per_token
        self._losses: list[float] = []

    def start(self, trainer: Trainer) -> None:
        self._step, self._interval = Pacer(trainer), Pacer(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        pace = self._step.take()
        if self.writer is None or result.passed_over:
            return
        state = trainer.state
        record: dict[str, float] = {
            "iteration": state.iteration,
            "consumed tokens": state.consumed_tokens,
            "lm loss": result.loss,
            **result.auxiliary_losses,
            "grad-norm": result.update.grad_norm,
            "learning-rate": learning_rate(trainer.optimizer),
            **self._speeds(pace),
            "skipped iterations": state.skipped_steps,
            "nan iterations": state.nan_steps,
            "spike iterations": state.spike_steps,
        }
        if math.isfinite(result.loss):
            self._losses.append(result.loss)
        due = state.iteration % trainer.run.logging.log_interval == 0 or trainer.done
        reported = due or not result.update.applied
        if reported:
            record["loss-scale"] = trainer.optimizer.get_loss_scale().item()  # waits for a GPU: not in every step
            if device.has_gpu():
                record["peak memory GiB"] = device.peak_memory() / 2**30
        self.writer.note(record)
        if reported:
            self._report(trainer, self.writer, record)

    def _report(self, trainer: Trainer, writer: MetricsWriter, record: dict[str, float]) -> None:
        """Plot and print a step's record, with means since the last report in place of its loss and speeds."""
        pace = self._interval.take()
        loss = statistics.fmean(self._losses) if self._losses else math.nan
        self._losses.clear()
        means = record | {"lm loss": loss} | self._speeds(pace)
        writer.plot(means)
        memory = f"{means['peak memory GiB']:.1f} GiB | " if "peak memory GiB" in means else ""
        print(
            f"iteration {trainer.state.iteration:>8}/{trainer.total_iters} | "
            f"tokens {means['consumed tokens']:.3e} | lm loss {loss:.4f} | grad norm {means['grad-norm']:.3f} | "
            f"lr {means['learning-rate']:.2e} | {pace.seconds_a_step:.3f} s/step | "
            f"{pace.tokens_per_second:,.0f} tokens/s | {means['TFLOP/s per rank']:.3f} TFLOP/s/rank | {memory}"
            f"skipped {means['skipped iterations']} | nan {means['nan iterations']} | "
            f"ETA {datetime.timedelta(seconds=pace.seconds_to_end(trainer))}",
            flush=True,
        )

    def _speeds(self, pace: Pace) -> dict[str, float]:
        return {
            "iteration-time": pace.seconds_a_step,
            "tokens per second": pace.tokens_per_second,
            "TFLOP/s per rank": pace.tokens_per_second * self.flops_per_token / device.world_size() / 1e12,
        }


_LATE = 1  # no number of a signal that is listened to, and below them: a signal says more than the clock


class Exits(Part):
    """Leave early, all ranks at one step: a signal on any rank, ``--exit-interval``, ``--exit-duration-in-mins``."""

    def __init__(self, signals: SignalListener) -> None:
        self.signals = signals

    def start(self, trainer: Trainer) -> None:
        """Signals that came while data was indexed and the model built: there is no step to save."""
        trainer.asked_to_stop = lambda: self._wish(trainer)
        self.interrupt(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        interval = trainer.run.training.exit_interval
        agreed = result.update.stop  # the step has asked all ranks, unless it made no update
        stops = self._stop(trainer, agreed) if agreed is not None else self.interrupt(trainer)
        if not stops and interval is not None and trainer.state.iteration % interval == 0:
            trainer.stop_reason = f"--exit-interval {interval}"

    def interrupt(self, trainer: Trainer) -> bool:
        """Whether the run must stop now, by a signal on any rank or the clock of one; all ranks ask at once."""
        return self._stop(trainer, largest(self._wish(trainer)))

    def _wish(self, trainer: Trainer) -> int:
        """This rank's reason to stop, 0 for none."""
        limit = trainer.run.training.exit_duration_in_mins
        late = limit is not None and (time.monotonic() - self.signals.started) / 60 >= limit
        return self.signals.received or (_LATE if late else 0)

    @staticmethod
    def _stop(trainer: Trainer, reason: int) -> bool:
        limit = trainer.run.training.exit_duration_in_mins
        if reason:
            trainer.stop_reason = f"--exit-duration-in-mins {limit}" if reason == _LATE else signal.Signals(reason).name
        return bool(reason)


class Evaluation(Part):
    """Validation loss every ``--eval-interval`` steps and after the last one, where test loss joins it.

    A run that is asked to stop does not finish an evaluation first: it comes when the run continues.
    """

    def __init__(self, writer: MetricsWriter | None, exits: Exits) -> None:
        self.writer, self.exits = writer, exits

    def start(self, trainer: Trainer) -> None:
        if trainer.state.evaluation_due:
            self.evaluate(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        finished = trainer.state.iteration >= trainer.total_iters
        if finished or trainer.state.iteration % trainer.run.training.eval_interval == 0:
            self.evaluate(trainer)

    def evaluate(self, trainer: Trainer) -> None:
        """Measure and log the losses of this iteration, or leave a note that they are due."""
        if trainer.run.training.eval_iters == 0:
            return
        losses = self._losses(trainer)
        trainer.state.evaluation_due = losses is None
        if self.writer is None or not losses:
            return
        self.writer.write({"iteration": trainer.state.iteration, **losses})
        for tag, loss in losses.items():
            perplexity = math.exp(min(loss, 20))
            print(
                f"iteration {trainer.state.iteration:>8} | {tag} {loss:.4f} | perplexity {perplexity:.2f}", flush=True
            )

    def _losses(self, trainer: Trainer) -> dict[str, float] | None:
        """By tag, on every rank; None if the run must stop."""
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
            loss = None if stopping else trainer.evaluate(stream, lambda: self.exits.interrupt(trainer))
            if loss is None:
                return None
            losses[tag] = loss
        return losses


class Checkpoints(Part):
    """A checkpoint every ``--save-interval`` steps and at the end, of good states only.

    One that is due after a bad step waits for a good one; weights that are not finite stop the run instead. One that
    cannot be written is given up with a warning and training goes on; if it is the last, the run fails.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        self._failure: SaveFailed | None = None
        self._waiting = False

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        interval = trainer.run.checkpoint.save_interval
        self._waiting |= interval is not None and trainer.state.iteration % interval == 0
        due = not trainer.failed and (trainer.done or (self._waiting and not trainer.state.bad_steps_in_a_row))
        self._attempt(lambda: self.checkpointer.finish_pending(wait=due))
        if due and not weights_are_finite(trainer.model):
            trainer.fail("weights are not finite and were not saved", WRONG_NUMBERS_EXIT_CODE)
        elif due:
            self._failure, self._waiting = None, False
            start = time.perf_counter()
            if self._attempt(self.checkpointer.save) and device.rank() == 0:
                seconds = time.perf_counter() - start
                print(
                    f"iteration {trainer.state.iteration:>8} | checkpoint, training waited {seconds:.2f} s", flush=True
                )

    def finish(self, trainer: Trainer) -> None:
        self._attempt(self.checkpointer.close)
        if self._failure is not None:
            raise self._failure

    def _attempt(self, work: Callable[[], None]) -> bool:
        """Whether ``work`` succeeded; a failure is remembered until the next checkpoint is begun."""
        try:
            work()
        except SaveFailed as failure:
            self._failure = failure
            if device.rank() == 0:
                print(f"WARNING: {failure}; the next one will be tried in its turn", file=sys.stderr, flush=True)
            return False
        return True


class Profile(Part):
    """A torch profiler trace of the steps that ``--profile-step-start`` and ``-end`` name."""

    def __init__(self, run: RunConfig) -> None:
        self.settings = run.logging
        self.folder = (run.checkpoint.save or Path(".")) / "profile"
        self._profiler = torch.profiler.profile()
        self._running = False

    def start(self, trainer: Trainer) -> None:
        self._toggle(trainer.state.iteration)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self._toggle(trainer.state.iteration)

    def finish(self, trainer: Trainer) -> None:
        self._toggle(self.settings.profile_step_end)

    def _toggle(self, iteration: int) -> None:
        inside = self.settings.profile_step_start <= iteration + 1 < self.settings.profile_step_end
        if inside and not self._running:
            configure_nvtx_profiling(True)
            self._profiler.start()
            self._running = True
        elif self._running and not inside:
            self._profiler.stop()
            configure_nvtx_profiling(False)
            self._running = False
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"rank{device.rank()}.json"
            self._profiler.export_chrome_trace(str(path))
            print(f"profile written to {path}", flush=True)


class GarbageCollection(Part):
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
