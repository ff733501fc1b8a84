"""The training loop. Whatever else happens during training is a part that subscribes to it (``parts.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mesh_megatron.config.run import RunConfig
from mesh_megatron.data.batches import MicroBatches
from mesh_megatron.parallel.place import PlacedModel
from mesh_megatron.training.rerun import Reruns
from mesh_megatron.training.spikes import is_spike
from mesh_megatron.training.state import TrainState
from mesh_megatron.training.step import PASSED_OVER, StepResult, StepRules, evaluation_sums, mean, train_step


def _never() -> bool:
    return False


class Part:
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
        model: PlacedModel,
        optimizer: MegatronOptimizer,
        schedule: OptimizerParamScheduler,
        data: RunData,
        state: TrainState,
        parts: Sequence[Part],
        *,
        total_iters: int,
        data_parallel_size: int,
    ) -> None:
        self.run, self.model, self.optimizer, self.schedule = run, model, optimizer, schedule
        self.data, self.state, self.parts = data, state, parts
        self.total_iters = total_iters
        self.data_parallel_size = data_parallel_size
        self.reruns = Reruns(run.training) if run.training.rerun_mode != "disabled" else None
        self.stop_reason: str | None = None
        self.asked_to_stop: Callable[[], int] = lambda: 0  # this rank, as a number: see ``Exits``
        self.exit_code = 0
        self.failed = False
        self.step_seconds = 0.0  # in steps alone: see pace.py

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
        """Steps until the run is long enough or a part sets ``stop_reason``."""
        for part in self.parts:
            part.start(self)
        while not self.done:
            for part in self.parts:
                part.before_step(self)
            result = self.step()
            for part in self.parts:
                part.after_step(self, result)
        for part in self.parts:
            part.finish(self)
        if self.data.train is not None:
            self.data.train.close()  # its workers do not hear the SIGTERM that Python ends them with and waits for

    def step(self) -> StepResult:
        """One optimizer step; a step that is skipped still reads its batch and moves the schedule on."""
        state, training = self.state, self.run.training
        batch_size = training.ramped_batch_size(state.consumed_samples, self.batch_size)
        result = PASSED_OVER if state.iteration + 1 in training.iterations_to_skip else self._compute(batch_size)
        self.schedule.step(increment=batch_size)
        state.iteration += 1
        state.consumed_samples += batch_size
        state.consumed_tokens += batch_size * self.model.seq_length
        state.passed_over_steps += result.passed_over
        state.skipped_steps += not (result.update.applied or result.passed_over)
        state.nan_steps += not result.finite
        state.spike_steps += result.spike
        if result.bad:
            state.bad_steps_in_a_row += 1
        elif result.update.applied:
            state.bad_steps_in_a_row = 0
            if training.loss_spike_factor is not None:
                state.recent_losses = [*state.recent_losses, result.loss][-training.loss_spike_window :]
        return result

    def _compute(self, batch_size: int) -> StepResult:
        state, training = self.state, self.run.training
        micro_batches = self.micro_batches(batch_size)
        stream = self.data.train
        batches = stream.micro_batches(state.consumed_samples, micro_batches) if stream is not None else None
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
    def batch_size(self) -> int:
        """Sequences of a step once any ramp-up is over."""
        return self.run.training.batch_size(self.data_parallel_size)

    def micro_batches(self, batch_size: int) -> int:
        """Micro-batches of one data-parallel rank in a step of ``batch_size`` sequences."""
        return batch_size // (self.run.training.micro_batch_size * self.data_parallel_size)
