"""The training loop and the interface of callbacks; everything else during training is a callback (``callbacks/``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from mesh_megatron.config.run import RunConfig
from mesh_megatron.data.batches import BatchShard, MicroBatches, with_token_numbers
from mesh_megatron.parallel.build_model import RankModel
from mesh_megatron.parallel.groups import data_parallel
from mesh_megatron.training.fault_tolerance.rerun import Reruns
from mesh_megatron.training.loss_spike import is_spike
from mesh_megatron.training.lr_schedule import Schedule
from mesh_megatron.training.run_length import data_position
from mesh_megatron.training.state import TrainState
from mesh_megatron.training.step import PASSED_OVER, StepResult, StepRules, evaluation_sums, mean, train_step


def _never() -> bool:
    return False


class Callback:
    """An action around the steps; all ranks call the same methods of their callbacks in the same order."""

    def start(self, trainer: Trainer) -> None:
        """Run before the first step."""

    def before_step(self, trainer: Trainer) -> None:
        """Run before every step."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Run after every step; ``trainer.state`` already counts it."""

    def finish(self, trainer: Trainer) -> None:
        """Run after the last step."""


@dataclass
class RunData:
    """The micro-batches of this rank; every stream is None on ranks that need no data."""

    train: MicroBatches | None
    valid: dict[str, MicroBatches | None]
    test: MicroBatches | None
    has_test: bool


@dataclass(kw_only=True, eq=False)
class Trainer:
    """One run on one rank."""

    run: RunConfig
    model: RankModel
    optimizer: MegatronOptimizer
    schedule: Schedule
    data: RunData
    state: TrainState
    callbacks: Sequence[Callback]
    """Called in this order around every step."""
    total_iters: int
    """Steps taken when the run is at its end."""
    data_parallel_size: int
    reruns: Reruns | None = field(init=False)
    stop_reason: str | None = field(default=None, init=False)
    """Why no further step is taken; None while training goes on and after a complete run."""
    asked_to_stop: Callable[[], int] = field(init=False)
    """Return this rank's reason to stop as a number, 0 for none; set by ``EarlyExit``."""
    exit_code: int = field(default=0, init=False)
    failed: bool = field(default=False, init=False)
    step_seconds: float = field(default=0.0, init=False)
    """Seconds spent in steps alone; see callbacks/throughput.py."""

    def __post_init__(self) -> None:
        self.asked_to_stop = lambda: 0
        self.reruns = Reruns(self.run.training) if self.run.training.rerun_mode != "disabled" else None

    @property
    def done(self) -> bool:
        """True if no further step will be taken."""
        return self.state.iteration >= self.total_iters or self.stop_reason is not None

    @property
    def finished(self) -> bool:
        """True if the run is complete: all steps taken, no evaluation due, no failure."""
        return self.state.iteration >= self.total_iters and not self.state.evaluation_due and not self.failed

    def fail(self, reason: str, exit_code: int) -> None:
        """Take no further step and save no checkpoint. Every rank must call this with the same ``exit_code``."""
        self.stop_reason, self.exit_code, self.failed = reason, exit_code, True

    def train(self) -> None:
        """Take steps until ``total_iters`` is reached or a callback sets ``stop_reason``."""
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
            self.data.train.close()  # workers ignore SIGTERM, so Python would block at exit

    def step(self) -> StepResult:
        """Take one optimizer step; a skipped step counts for the schedule and the position in the data too."""
        state, training = self.state, self.run.training
        batch_size = training.ramped_batch_size(state.consumed_samples, self.batch_size, self.model.seq_length)
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
            if training.loss_spike_factor is not None:
                state.remember(result.loss, self.drawn_loops, training.loss_spike_window)
            else:
                state.recent_losses, state.recent_by_loops = [], {}
        return result

    def _compute(self, batch_size: int) -> StepResult:
        state, training = self.state, self.run.training
        self.model.set_loops(self.run.loops_of_step(state.iteration + 1))
        micro_batches = self.micro_batches(batch_size)
        stream = self.data.train
        batches = stream.micro_batches(self.next_sample, micro_batches) if stream is not None else None
        if self.run.model.drops:
            shard = BatchShard(
                micro_batch_size=training.micro_batch_size,
                data_parallel_rank=data_parallel()[0],
                data_parallel_size=self.data_parallel_size,
            )
            batches = with_token_numbers(batches, shard, self.model.seq_length, self.next_sample, micro_batches)
        rules = StepRules(
            is_spike=lambda loss: is_spike(loss, state.recent(self.drawn_loops), training),
            skip_spikes=training.skip_loss_spikes,
            stop=self.asked_to_stop,
            log_params_norm=self.run.logging.log_params_norm,
            log_zeros=self.run.logging.log_num_zeros_in_grad,
            reruns=self.reruns,
        )
        return train_step(self.model, self.optimizer, batches, micro_batches, training.micro_batch_size, rules)

    def evaluate(self, stream: MicroBatches | None, interrupted: Callable[[], bool] = _never) -> float | None:
        """Return the loss per token (nats) over the first ``--eval-iters`` global batches of a data set.

        These are always the same batches. ``interrupted`` is called after each of them and must return the same value
        on all ranks; if it is true, evaluation ends and None is returned.
        """
        self.model.set_loops(self.run.model.segments.loops)
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
    def drawn_loops(self) -> int | None:
        """Number of loops of this step, or None if it is the same in all steps."""
        return self.model.loops if self.run.loops.sampled else None

    @property
    def next_sample(self) -> int:
        """Index of the first sample of the next step."""
        state = self.state
        return data_position(self.run.training, self.model.seq_length, state.consumed_samples, state.consumed_tokens)

    @property
    def batch_size(self) -> int:
        """Sequences per step after any ramp-up."""
        return self.run.training.batch_size(self.data_parallel_size)

    def micro_batches(self, batch_size: int) -> int:
        """Return the micro-batches per data-parallel rank in a step of ``batch_size`` sequences."""
        return batch_size // (self.run.training.micro_batch_size * self.data_parallel_size)
