"""The training loop. Whatever else happens during training is a callback (``callbacks/``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from mesh_megatron.config.run import RunConfig
from mesh_megatron.data.batches import MicroBatches
from mesh_megatron.parallel.build_model import RankModel
from mesh_megatron.training.fault_tolerance.rerun import Reruns
from mesh_megatron.training.loss_spike import is_spike
from mesh_megatron.training.lr_schedule import Schedule
from mesh_megatron.training.run_length import data_position
from mesh_megatron.training.state import TrainState
from mesh_megatron.training.step import PASSED_OVER, StepResult, StepRules, evaluation_sums, mean, train_step


def _never() -> bool:
    return False


class Callback:
    """Something that happens around the steps; every rank calls the same methods in the same order."""

    def start(self, trainer: Trainer) -> None:
        """Before the first step."""

    def before_step(self, trainer: Trainer) -> None:
        """Before every step."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """After every step; the state already counts it."""

    def finish(self, trainer: Trainer) -> None:
        """After the last step."""


@dataclass
class RunData:
    """This rank's micro-batches; every stream is None on ranks that need no data."""

    train: MicroBatches | None
    valid: dict[str, MicroBatches | None]
    test: MicroBatches | None
    has_test: bool


class Trainer:
    """One run on one rank."""

    def __init__(
        self,
        run: RunConfig,
        model: RankModel,
        optimizer: MegatronOptimizer,
        schedule: Schedule,
        data: RunData,
        state: TrainState,
        callbacks: Sequence[Callback],
        *,
        total_iters: int,
        data_parallel_size: int,
    ) -> None:
        self.run, self.model, self.optimizer, self.schedule = run, model, optimizer, schedule
        self.data, self.state, self.callbacks = data, state, callbacks
        self.total_iters = total_iters
        self.data_parallel_size = data_parallel_size
        self.reruns = Reruns(run.training) if run.training.rerun_mode != "disabled" else None
        self.stop_reason: str | None = None
        self.asked_to_stop: Callable[[], int] = lambda: 0  # this rank, as a number: see ``EarlyExit``
        self.exit_code = 0
        self.failed = False
        self.step_seconds = 0.0  # in steps alone: see callbacks/throughput.py

    @property
    def done(self) -> bool:
        """No further step will be taken."""
        return self.state.iteration >= self.total_iters or self.stop_reason is not None

    @property
    def finished(self) -> bool:
        """The run has come to its end, with all that belongs to it."""
        return self.state.iteration >= self.total_iters and not self.state.evaluation_due and not self.failed

    def fail(self, reason: str, exit_code: int) -> None:
        """Take no further step and save no checkpoint: something is wrong. Every rank must call this alike."""
        self.stop_reason, self.exit_code, self.failed = reason, exit_code, True

    def train(self) -> None:
        """Steps until the run is long enough or a callback sets ``stop_reason``."""
        for callback in self.callbacks:
            callback.start(self)
        while not self.done:
            for callback in self.callbacks:
                callback.before_step(self)
            result = self.step()
            for callback in self.callbacks:
                callback.after_step(self, result)
        for callback in self.callbacks:
            callback.finish(self)
        if self.data.train is not None:
            self.data.train.close()  # its workers do not hear the SIGTERM that Python ends them with and waits for

    def step(self) -> StepResult:
        """One optimizer step; a step that is skipped still reads its batch and counts for the schedule."""
        state, training = self.state, self.run.training
        batch_size = training.ramped_batch_size(state.consumed_samples, self.batch_size)
        self.schedule.set_rates(state)
        result = PASSED_OVER if state.iteration + 1 in training.iterations_to_skip else self._compute(batch_size)
        state.count_step(batch_size, self.model.seq_length)
        state.passed_over_steps += result.passed_over
        state.skipped_steps += not (result.update.applied or result.passed_over)
        state.nan_steps += not result.finite
        state.spike_steps += result.spike
        if result.bad:
            state.bad_steps_in_a_row += 1
        elif result.update.applied:
            state.bad_steps_in_a_row = 0
            remembered = [*state.recent_losses, result.loss][-training.loss_spike_window :]
            state.recent_losses = remembered if training.loss_spike_factor is not None else []
        return result

    def _compute(self, batch_size: int) -> StepResult:
        state, training = self.state, self.run.training
        micro_batches = self.micro_batches(batch_size)
        stream = self.data.train
        batches = stream.micro_batches(self.next_sample, micro_batches) if stream is not None else None
        rules = StepRules(
            lambda loss: is_spike(loss, state.recent_losses, training), training.skip_loss_spikes,
            self.asked_to_stop, self.reruns,
        )  # fmt: skip
        return train_step(self.model, self.optimizer, batches, micro_batches, training.micro_batch_size, rules)

    def evaluate(self, stream: MicroBatches | None, interrupted: Callable[[], bool] = _never) -> float | None:
        """Loss a token over the first ``--eval-iters`` global batches of a data set: always the same ones.

        ``interrupted`` is asked after each, and must answer alike on all ranks; None if it said yes.
        """
        micro_batches = self.micro_batches(self.batch_size)
        losses, tokens = 0.0, 0.0
        try:
            for number in range(self.run.training.eval_iters):
                start = number * self.batch_size
                batches: Any = stream.micro_batches(start, micro_batches) if stream is not None else None
                sums = evaluation_sums(self.model, batches, micro_batches, self.run.training.micro_batch_size)
                losses, tokens = losses + sums[0], tokens + sums[1]
                if interrupted():
                    return None
        finally:
            if stream is not None:
                stream.close()
        return mean(losses, tokens)

    @property
    def next_sample(self) -> int:
        """The number of the sample that the next step begins with."""
        state = self.state
        return data_position(self.run.training, self.model.seq_length, state.consumed_samples, state.consumed_tokens)

    @property
    def batch_size(self) -> int:
        """Sequences of a step once any ramp-up is over."""
        return self.run.training.batch_size(self.data_parallel_size)

    def micro_batches(self, batch_size: int) -> int:
        """Micro-batches of one data-parallel rank in a step of ``batch_size`` sequences."""
        return batch_size // (self.run.training.micro_batch_size * self.data_parallel_size)
