"""The times of the parts of steps: a line and plotted points every ``--log-interval`` steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from mesh_megatron.checkpoint.optimizer_state import sub_optimizers
from mesh_megatron.config.logging import LoggingConfig
from mesh_megatron.parallel.collectives import gather
from mesh_megatron.training.metrics.timers import Timers
from mesh_megatron.training.metrics.writer import MetricsWriter
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer

logger = logging.getLogger(__name__)

_TITLES = {"max": "max time across ranks", "minmax": "(min, max) time across ranks", "all": "time of every rank"}


class StepTimes(Callback):
    """Has the parts of steps timed up to ``--timing-log-level``; no step waits for it but one with a line."""

    def __init__(self, writer: MetricsWriter | None, settings: LoggingConfig) -> None:
        """``writer`` is None except on the rank that writes."""
        self.writer, self.settings = writer, settings
        self._timers = Timers(settings.timing_log_level)
        self._steps = 0

    def start(self, trainer: Trainer) -> None:
        trainer.model.config.timers = self._timers
        for part in sub_optimizers(trainer.optimizer):
            part.config.timers = self._timers

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self._steps += not result.passed_over
        iteration = trainer.state.iteration
        if not self._steps or (iteration % self.settings.log_interval and not trainer.done):
            return
        everyones = gather({name: seconds / self._steps for name, seconds in self._timers.take().items()})
        self._steps = 0
        if self.writer is None:
            return
        logger.info(f"iteration {iteration:>8} | {times_line(everyones, self.settings.timing_log_option)}")
        if self.settings.log_timers_to_tensorboard:
            points = {f"{name}-time": max(times) for name, times in by_name(everyones).items()}
            self.writer.plot({"iteration": iteration, **points})


def by_name(ranks: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return the seconds of every part by its name, of the ranks that have this part."""
    names = dict.fromkeys(name for times in ranks for name in times)
    return {name: [times[name] for times in ranks if name in times] for name in names}


def times_line(ranks: Sequence[Mapping[str, float]], option: str) -> str:
    """Return a line with the milliseconds per step of every part, as ``--timing-log-option`` says."""
    texts = []
    for name, times in by_name(ranks).items():
        shown = [1000 * seconds for seconds in times]
        if option == "max":
            text = f"{max(shown):.2f}"
        elif option == "minmax":
            text = f"({min(shown):.2f}, {max(shown):.2f})"
        else:
            text = " ".join(f"{each:.2f}" for each in shown)
        texts.append(f"{name} {text}")
    return f"{_TITLES[option]} (ms per step) | {' | '.join(texts)}"
