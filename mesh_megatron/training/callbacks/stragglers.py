"""Stragglers: ranks that need more time or memory than others with the same work. Also reports slow steps."""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from mesh_megatron.parallel.collectives import gather, gather_numbers
from mesh_megatron.platform import device
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer

logger = logging.getLogger(__name__)

# Smaller absolute differences are not reported, whatever their ratio to the median.
_SECONDS, _BYTES = 0.05, 1 << 28
# Steps that the median is taken over, and the fewest that it needs.
_STEPS, _ENOUGH_STEPS = 100, 10


@dataclass(frozen=True)
class Seat:
    """The pipeline stage and the host of a rank."""

    stage: int
    """Pipeline stage; all ranks of a stage do the same work."""
    host: str


class Stragglers(Callback):
    """Prints ranks (every ``--log-interval`` steps) and steps (at once) that exceed ``factor`` times the median."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._watch = device.Stopwatch()
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._since_report = 0
        self._first = True

    def start(self, trainer: Trainer) -> None:
        for chunk in trainer.model.chunks:
            chunk.register_forward_pre_hook(lambda *_: self._watch.start() if torch.is_grad_enabled() else None)
            chunk.register_forward_hook(lambda *_: self._watch.stop() if torch.is_grad_enabled() else None)
        self._seats = gather(Seat(parallel_state.get_pipeline_model_parallel_rank(), socket.gethostname()))

    def before_step(self, trainer: Trainer) -> None:
        self._began = time.perf_counter()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if result.passed_over:  # it computed nothing
            return
        if self._first:  # it compiles, connects and allocates
            self._first = False
            self._load(trainer)
            return
        iteration = trainer.state.iteration
        self._since_report += 1
        line = slow_step(iteration, time.perf_counter() - self._began, self._steps, self.factor)
        if iteration % trainer.run.logging.log_interval == 0:
            loads_R2 = gather_numbers(self._load(trainer))
            if device.rank() == 0:
                for straggler in outlying(loads_R2.cpu(), self._seats, self.factor):
                    logger.info(f"iteration {iteration:>8} | straggler | {straggler}")
        if line is not None:
            logger.info(f"iteration {iteration:>8} | slow step | {line}")

    def _load(self, trainer: Trainer) -> tuple[float, int]:
        """Return (seconds per step, peak bytes) of this rank, and start the next measurement.

        Seconds are those of forward passes in training and of reading data since the last report, so that most of the
        waiting for other ranks is excluded.
        """
        reading = trainer.data.train.take_seconds() if trainer.data.train is not None else 0.0
        steps, self._since_report = max(self._since_report, 1), 0
        return (self._watch.take() + reading) / steps, device.peak_memory()


def slow_step(iteration: int, seconds: float, before: deque[float], factor: float) -> str | None:
    """Return a line if the step was slow, else None; append its ``seconds`` to those of the steps ``before``."""
    usual = statistics.median(before) if len(before) >= _ENOUGH_STEPS else seconds
    before.append(seconds)
    if seconds <= factor * usual or seconds - usual <= _SECONDS:
        return None
    return f"step {iteration} took {seconds:.2f} s, {seconds / usual:.1f} times the median of the last {len(before)}"


def outlying(loads_R2: Tensor, seats: Sequence[Seat], factor: float) -> list[str]:
    """Return a line for every rank whose seconds or bytes exceed ``factor`` times the median of its stage.

    ``loads_R2`` holds (seconds per step, bytes) of each of the R ranks. For an even number of ranks the lower median is
    taken, so that with two ranks each is compared with the other.
    """
    stages_R = torch.tensor([seat.stage for seat in seats])
    usual_R2 = torch.empty_like(loads_R2)
    for stage in stages_R.unique():
        usual_R2[stages_R == stage] = loads_R2[stages_R == stage].median(0).values
    least = loads_R2.new_tensor([_SECONDS, _BYTES])
    stands_out_R2 = (loads_R2 > factor * usual_R2) & (loads_R2 - usual_R2 > least)
    lines = []
    for rank, column in stands_out_R2.nonzero().tolist():
        load, usual, name = loads_R2[rank, column], usual_R2[rank, column], f"rank {rank} on {seats[rank].host}"
        if column == 0:
            lines.append(f"{name} takes {load:.2f} s per step for forward passes and reading, others {usual:.2f} s")
        else:
            lines.append(f"{name} has used {load / 2**30:.1f} GiB of memory, others {usual / 2**30:.1f} GiB")
    return lines
