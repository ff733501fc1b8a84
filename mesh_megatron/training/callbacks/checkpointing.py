"""The schedule of checkpoints, and what happens if one is due after a bad step or cannot be written."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from mesh_megatron.checkpoint.folder import SaveFailed
from mesh_megatron.platform import device
from mesh_megatron.training.callbacks.bad_steps import weights_are_finite
from mesh_megatron.training.checkpointer import Checkpointer
from mesh_megatron.training.fault_tolerance.run_status import WRONG_NUMBERS_EXIT_CODE
from mesh_megatron.training.metrics.writer import MetricsWriter
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer

logger = logging.getLogger(__name__)


class Checkpointing(Callback):
    """Saves a checkpoint every ``--save-interval`` steps and at the end, of good states only.

    A checkpoint that is due after a bad step is postponed to the next good step; if weights are not finite, the run
    fails instead. If a checkpoint cannot be written, a warning is printed and training continues; if it is the last
    one, the run fails.
    """

    def __init__(self, checkpointer: Checkpointer, times: MetricsWriter | None = None) -> None:
        """``times`` gets the seconds that training waits for each checkpoint."""
        self.checkpointer, self.times = checkpointer, times
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
            if self._attempt(self.checkpointer.save):
                seconds = time.perf_counter() - start
                logger.info(f"iteration {trainer.state.iteration:>8} | checkpoint, training waited {seconds:.2f} s")
                if self.times is not None:
                    self.times.plot({"iteration": trainer.state.iteration, "save-checkpoint-time": seconds})

    def finish(self, trainer: Trainer) -> None:
        self._attempt(self.checkpointer.close)
        if self._failure is not None:
            raise self._failure

    def _attempt(self, work: Callable[[], None]) -> bool:
        """Return whether ``work`` succeeded; a failure is remembered until the next checkpoint begins."""
        try:
            work()
        except SaveFailed as failure:
            self._failure = failure
            if device.rank() == 0:
                logger.warning(f"{failure}; the next one is attempted when it is due")
            return False
        return True
