"""The callback that keeps ``SAVE/heartbeat.json`` up to date; ``fault_tolerance/run_status.py`` defines the file."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

from mesh_megatron.checkpoint.folder import folder_of, latest_iteration
from mesh_megatron.platform import device
from mesh_megatron.training.callbacks.throughput import ThroughputMeter
from mesh_megatron.training.fault_tolerance.run_status import RunStatus, read_status, refused, write_status
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN = 1.0


class Heartbeat(Callback):
    """Writes the status after a step (at most once per second), at the start and at the end; rank 0 only.

    If the file cannot be written, a warning is printed once and training continues.
    """

    def __init__(self, save: Path) -> None:
        self.save = save
        self._before: RunStatus | None = None
        with contextlib.suppress(ValueError):  # no run has been there yet
            self._before = read_status(save)
        self.status = RunStatus(world_size=device.world_size())
        self._written_at = time.monotonic()
        self._warned = False
        self._write()

    def start(self, trainer: Trainer) -> None:
        self.status.status = "running"
        self._pacer = ThroughputMeter(trainer)
        self._follow(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if time.monotonic() - self._written_at < _SECONDS_BETWEEN:
            return
        pace = self._pacer.take()
        self.status.loss = None if result.passed_over else result.loss
        self.status.tokens_per_second = pace.tokens_per_second
        self.status.eta_seconds = pace.seconds_to_end(trainer)
        self._follow(trainer)

    def end(self, trainer: Trainer) -> None:
        """Record the end of the run, as finished, stopped early or failed."""
        self.status.status = "failed" if trainer.failed else "finished" if trainer.finished else "stopped early"
        self.status.reason = trainer.stop_reason
        self.status.exit_code = trainer.exit_code if trainer.failed else None
        self.status.eta_seconds = None
        self._follow(trainer)

    def fail(self, error: BaseException) -> None:
        """Record that ``error`` ends the run; a refusal, before its first step, leaves the status of the run before."""
        if isinstance(error, ValueError):
            self.status = refused(self._before, str(error))
        else:
            self.status.status, self.status.reason = "failed", f"{type(error).__name__}: {error}"
            self.status.exit_code = 1
        self.status.eta_seconds = None
        self._write()

    def _follow(self, trainer: Trainer) -> None:
        self.status.iteration, self.status.train_iters = trainer.state.iteration, trainer.total_iters
        self.status.consumed_tokens = trainer.state.consumed_tokens
        self._write()

    def _write(self) -> None:
        self._written_at = time.monotonic()
        with contextlib.suppress(ValueError):  # the tracker is damaged: the next checkpoint replaces it
            newest = latest_iteration(self.save)
            self.status.last_checkpoint = folder_of(self.save, newest).name if newest is not None else None
        try:
            write_status(self.save, self.status)
        except OSError as error:
            if not self._warned:
                logger.warning(f"no heartbeat: {error}")
            self._warned = True
