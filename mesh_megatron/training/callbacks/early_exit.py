"""Early ends of a run, at the same step on all ranks: by a signal, a step interval or a time limit."""

from __future__ import annotations

import signal
import time

from mesh_megatron.parallel.collectives import largest
from mesh_megatron.training.fault_tolerance.signals import SignalListener
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer

_LATE = 1  # below the number of every signal in use, so that a signal takes precedence over the time limit


class EarlyExit(Callback):
    """Ends the run on a signal to any rank, at ``--exit-interval`` and after ``--exit-duration-in-mins``.

    The time limit is checked only from the end of the first step on, so that a run which is restarted repeatedly still
    makes progress.
    """

    def __init__(self, signals: SignalListener) -> None:
        self.signals = signals

    def start(self, trainer: Trainer) -> None:
        """Act on signals that came during data indexing and model building, before there is a step to save."""
        trainer.asked_to_stop = lambda: self._wish(trainer)
        self.interrupt(trainer, by_clock=False)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        interval = trainer.run.training.exit_interval
        agreed = result.update.stop  # the step has asked all ranks, unless it made no update
        stops = self._stop(trainer, agreed) if agreed is not None else self.interrupt(trainer)
        if not stops and interval is not None and trainer.state.iteration % interval == 0:
            trainer.stop_reason = f"--exit-interval {interval}"

    def interrupt(self, trainer: Trainer, by_clock: bool = True) -> bool:
        """Return whether the run must stop now, because of a signal or the time limit on any rank; a collective.

        Sets ``trainer.stop_reason``. ``by_clock`` includes the time limit.
        """
        return self._stop(trainer, largest(self._wish(trainer, by_clock)))

    def _wish(self, trainer: Trainer, by_clock: bool = True) -> int:
        """Return this rank's reason to stop, 0 for none."""
        limit = trainer.run.training.exit_duration_in_mins
        late = by_clock and limit is not None and (time.monotonic() - self.signals.started) / 60 >= limit
        return self.signals.received or (_LATE if late else 0)

    @staticmethod
    def _stop(trainer: Trainer, reason: int) -> bool:
        limit = trainer.run.training.exit_duration_in_mins
        if reason:
            trainer.stop_reason = f"--exit-duration-in-mins {limit}" if reason == _LATE else signal.Signals(reason).name
        return bool(reason)
