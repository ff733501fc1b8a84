"""Reports of bad steps and loss spikes with the samples they read, and the end of a run with too many in a row."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from mesh_megatron.data.datasets import Samples
from mesh_megatron.parallel.build_model import RankModel
from mesh_megatron.parallel.collectives import gather, largest
from mesh_megatron.parallel.fully_sharded import held_part
from mesh_megatron.parallel.groups import data_parallel
from mesh_megatron.training.fault_tolerance.run_status import WRONG_NUMBERS_EXIT_CODE
from mesh_megatron.training.metrics.writer import MetricsWriter
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer

logger = logging.getLogger(__name__)


class BadSteps(Callback):
    """Reports bad steps, spikes and skipped iterations; fails the run after ``--max-bad-steps`` bad steps in a row."""

    def __init__(self, writer: MetricsWriter | None) -> None:
        """``writer`` is None except on the rank that writes."""
        self.writer = writer
        self._first_sample = 0

    def before_step(self, trainer: Trainer) -> None:
        self._first_sample = trainer.next_sample

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if result.passed_over:
            self._report(trainer, "passed over (--iterations-to-skip)", [])
        elif result.bad or result.spike:
            self._report(trainer, _description(result), self._suspects(trainer, result))
        limit = trainer.run.training.max_bad_steps
        if limit and result.bad and trainer.state.bad_steps_in_a_row >= limit:
            last = trainer.state.iteration
            trainer.fail(
                f"{limit} bad steps in a row (--max-bad-steps); this state is not saved. The same command continues "
                "from the newest checkpoint and reads the same samples again: add --iterations-to-skip "
                f"{' '.join(map(str, range(last - limit + 1, last + 1)))} to skip those of the bad steps",
                WRONG_NUMBERS_EXIT_CODE,
            )

    def _suspects(self, trainer: Trainer, result: StepResult) -> list[int]:
        """Return the samples of micro-batches whose loss is not finite or, for a spike, of the one with the highest."""
        size = trainer.run.training.micro_batch_size
        rank, ranks = data_parallel()
        mine = {}
        if result.micro_batch_losses is not None:
            for number, (loss, tokens) in enumerate(result.micro_batch_losses[:, :2].tolist()):
                mine[self._first_sample + (number * ranks + rank) * size] = (loss, tokens)
        if math.isfinite(result.loss) and not result.spike:
            return []  # only the gradient is not finite: its micro-batch is unknown
        chosen = worst(gather_losses(mine), finite=math.isfinite(result.loss))
        return [first + i for first in chosen for i in range(size)]

    def _report(self, trainer: Trainer, event: str, suspects: Sequence[int]) -> None:
        if self.writer is None:
            return
        iteration, last = trainer.state.iteration, trainer.next_sample - 1
        record: dict[str, Any] = {"iteration": iteration, "event": event, "samples": [self._first_sample, last]}
        line = f"iteration {iteration:>8} | {event} | samples {self._first_sample} to {last}"
        if suspects:
            record["suspicious samples"] = list(suspects)
            line += f" | suspicious {' '.join(map(str, suspects))}"
            if origins := _origins(trainer, suspects):
                record["suspicious documents"] = origins
                line += f": {'; '.join(origins)}"
        self.writer.write(record)
        logger.info(line)


def gather_losses(mine: dict[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    """Return (summed loss, tokens) of every micro-batch by its first sample, on every rank; a collective.

    Context-parallel ranks each hold the sums over their share of the sequences, which are added here.
    """
    merged: dict[int, tuple[float, float]] = {}
    for first, (loss, tokens) in (entry for rank in gather(mine) for entry in rank.items()):
        known_loss, known_tokens = merged.get(first, (0.0, 0.0))
        merged[first] = known_loss + loss, known_tokens + tokens
    return merged


def worst(losses: dict[int, tuple[float, float]], finite: bool) -> list[int]:
    """Return the first samples of the worst micro-batches.

    With ``finite`` that is the one with the highest loss per token, else all whose loss is not finite.
    """
    if finite:
        return [max(losses, key=lambda first: losses[first][0] / max(losses[first][1], 1.0))]
    return sorted(first for first, (loss, _) in losses.items() if not math.isfinite(loss))


@torch.no_grad()
def weights_are_finite(model: RankModel) -> bool:
    """Return whether all weights of all ranks are finite; a collective that every rank must call."""
    model.complete_weights()
    parameters = [held_part(parameter) for module in model.modules for parameter in module.parameters()]
    finite = torch.stack([parameter.isfinite().all() for parameter in parameters]).all().item() if parameters else True
    return not largest(not finite)


def _description(result: StepResult) -> str:
    if result.spike:
        cause = f"loss {result.loss:.4f} is a spike"
    elif not math.isfinite(result.loss):
        cause = f"loss is {result.loss}"
    else:
        cause = f"loss {result.loss:.4f}, but the gradient's norm is {result.update.grad_norm}"
    return f"{cause}, weights {'updated' if result.update.applied else 'unchanged'}"


def _origins(trainer: Trainer, samples: Sequence[int]) -> list[str]:
    """Return the documents that the samples were cut from; empty on ranks that read no data."""
    dataset = trainer.data.train.dataset if trainer.data.train is not None else None
    return [dataset.origin(sample) for sample in samples] if isinstance(dataset, Samples) else []
