"""Ranks that are slower or fuller than others that do the same work, and steps that take longer than others."""

from __future__ import annotations

import socket
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core import parallel_state

from mesh_megatron.platform import device
from mesh_megatron.training.agreement import gather
from mesh_megatron.training.loop import Part, Trainer
from mesh_megatron.training.step import StepResult

# Differences below these are nobody's trouble, however many times the others' they are.
_SECONDS, _BYTES = 0.05, 1 << 28
_STEPS, _ENOUGH_STEPS = 100, 10


@dataclass(frozen=True)
class Load:
    """What a step costs one rank."""

    stage: int
    """Of the pipeline; ranks of one stage do the same work."""
    host: str
    seconds: float
    """A step's own forward passes and reading of data: without most of the waiting for other ranks."""
    memory: int
    """The most bytes in use so far."""


class Outliers(Part):
    """Prints what stands out by ``factor``: ranks every ``--log-interval`` steps, steps as they come."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._watch = device.Stopwatch()
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._since_report = 0
        self._first = True

    def start(self, trainer: Trainer) -> None:
        for chunk in trainer.model.chunks:
            chunk.register_forward_pre_hook(lambda *_: self._watch.start())
            chunk.register_forward_hook(lambda *_: self._watch.stop())

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
            loads = gather(self._load(trainer))
            if device.rank() == 0:
                for outlier in outlying(loads, self.factor):
                    print(f"iteration {iteration:>8} | outlier | {outlier}", flush=True)
        if line is not None and device.rank() == 0:
            print(f"iteration {iteration:>8} | outlier | {line}", flush=True)

    def _load(self, trainer: Trainer) -> Load:
        """Since the last report, which starts anew."""
        reading = trainer.data.train.take_seconds() if trainer.data.train is not None else 0.0
        steps, self._since_report = max(self._since_report, 1), 0
        seconds = (self._watch.take() + reading) / steps
        stage = parallel_state.get_pipeline_model_parallel_rank()
        return Load(stage, socket.gethostname(), seconds, device.peak_memory())


def slow_step(iteration: int, seconds: float, before: deque[float], factor: float) -> str | None:
    """What to say of a step, which joins those ``before``."""
    usual = statistics.median(before) if len(before) >= _ENOUGH_STEPS else seconds
    before.append(seconds)
    if seconds <= factor * usual or seconds - usual <= _SECONDS:
        return None
    return f"step {iteration} took {seconds:.2f} s, {seconds / usual:.1f} times the median of the {len(before)} last"


def outlying(loads: Sequence[Load], factor: float) -> list[str]:
    """A line for every rank that takes ``factor`` times what the median of the other ranks of its stage takes."""
    stages = defaultdict(list)
    for rank, load in enumerate(loads):
        stages[load.stage].append(rank)
    lines = []
    for rank, load in enumerate(loads):
        others = [loads[other] for other in stages[load.stage] if other != rank]
        if not others:
            continue
        seconds = statistics.median(other.seconds for other in others)
        memory = statistics.median(other.memory for other in others)
        name = f"rank {rank} on {load.host}"
        if load.seconds > factor * seconds and load.seconds - seconds > _SECONDS:
            lines.append(
                f"{name} takes {load.seconds:.2f} s of a step for forward passes and reading, others {seconds:.2f} s"
            )
        if load.memory > factor * memory and load.memory - memory > _BYTES:
            lines.append(f"{name} has used {load.memory / 2**30:.1f} GiB of memory, others {memory / 2**30:.1f} GiB")
    return lines
