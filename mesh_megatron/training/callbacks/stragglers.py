"""Ranks that are slower or fuller than others that do the same work, and steps that take longer than others."""

from __future__ import annotations

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

# Differences below these are nobody's trouble, however many times the others' they are.
_SECONDS, _BYTES = 0.05, 1 << 28
_STEPS, _ENOUGH_STEPS = 100, 10


@dataclass(frozen=True)
class Seat:
    """Where a rank sits."""

    stage: int
    """Of the pipeline; ranks of one stage do the same work."""
    host: str


class Stragglers(Callback):
    """Prints what stands out by ``factor``: ranks every ``--log-interval`` steps, steps as they come."""

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
        if self._first:  # compiles, connects, allocates
            self._first = False
            self._load(trainer)
            return
        iteration = trainer.state.iteration
        self._since_report += 1
        line = slow_step(iteration, time.perf_counter() - self._began, self._steps, self.factor)
        if iteration % trainer.run.logging.log_interval == 0:
            loads_R2 = gather_numbers(self._load(trainer))
            if device.rank() == 0:
                for outlier in outlying(loads_R2.cpu(), self._seats, self.factor):
                    print(f"iteration {iteration:>8} | outlier | {outlier}", flush=True)
        if line is not None and device.rank() == 0:
            print(f"iteration {iteration:>8} | outlier | {line}", flush=True)

    def _load(self, trainer: Trainer) -> tuple[float, int]:
        """What a step has cost this rank since the last report, which starts anew.

        Seconds of its own forward passes in training and reading of data, without most of the waiting for other ranks;
        the most bytes in use so far.
        """
        reading = trainer.data.train.take_seconds() if trainer.data.train is not None else 0.0
        steps, self._since_report = max(self._since_report, 1), 0
        return (self._watch.take() + reading) / steps, device.peak_memory()


def slow_step(iteration: int, seconds: float, before: deque[float], factor: float) -> str | None:
    """What to say of a step, which joins those ``before``."""
    usual = statistics.median(before) if len(before) >= _ENOUGH_STEPS else seconds
    before.append(seconds)
    if seconds <= factor * usual or seconds - usual <= _SECONDS:
        return None
    return f"step {iteration} took {seconds:.2f} s, {seconds / usual:.1f} times the median of the {len(before)} last"


def outlying(loads_R2: Tensor, seats: Sequence[Seat], factor: float) -> list[str]:
    """A line for every rank whose seconds or bytes are ``factor`` times the median of its stage.

    Of an even number the lower one of the middle two: where there are two ranks, that is the other one's.
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
            lines.append(f"{name} takes {load:.2f} s of a step for forward passes and reading, others {usual:.2f} s")
        else:
            lines.append(f"{name} has used {load / 2**30:.1f} GiB of memory, others {usual / 2**30:.1f} GiB")
    return lines
