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
        self.interrupt(trainer, by_clock=False)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        interval = trainer.run.training.exit_interval
        if not self.interrupt(trainer) and interval is not None and trainer.state.iteration % interval == 0:
            trainer.stop_reason = f"--exit-interval {interval}"

    def interrupt(self, trainer: Trainer, by_clock: bool = True) -> bool:
        """Return whether the run must stop now, because of a signal or the time limit on any rank; a collective.

        Sets ``trainer.stop_reason``. ``by_clock`` includes the time limit.
        """
        limit = trainer.run.training.exit_duration_in_mins
        late = by_clock and limit is not None and (time.monotonic() - self.signals.started) / 60 >= limit
        reason = largest(self.signals.received or (_LATE if late else 0))
        if reason:
            trainer.stop_reason = f"--exit-duration-in-mins {limit}" if reason == _LATE else signal.Signals(reason).name
        return bool(reason)
