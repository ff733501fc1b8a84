"""Numbers that go wrong: which steps were bad, what they read, and when there have been too many in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mesh_megatron.data.datasets import Samples
from mesh_megatron.parallel.build_model import RankModel
from mesh_megatron.parallel.collectives import gather, largest
from mesh_megatron.parallel.groups import data_parallel
from mesh_megatron.training.fault_tolerance.run_status import WRONG_NUMBERS_EXIT_CODE
from mesh_megatron.training.metrics.writer import MetricsWriter
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer


class BadSteps(Callback):
    """Names the samples of every bad step, spike and step passed over; stops after too many bad ones in a row."""

    def __init__(self, writer: MetricsWriter | None) -> None:
        """``writer`` on the rank that writes, None on the others."""
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
                f"{limit} bad steps in a row (--max-bad-steps); no checkpoint is saved of this end. The same "
                "command continues from the newest checkpoint, and would read the same samples: --iterations-to-skip "
                f"{' '.join(map(str, range(last - limit + 1, last + 1)))} passes over those of the bad steps",
                WRONG_NUMBERS_EXIT_CODE,
            )

    def _suspects(self, trainer: Trainer, result: StepResult) -> list[int]:
        """Samples of the micro-batches whose loss is not finite or, of a spike, of the one with the highest."""
        size = trainer.run.training.micro_batch_size
        rank, ranks = data_parallel()
        mine = {}
        if result.micro_batch_losses is not None:
            for number, (loss, tokens) in enumerate(result.micro_batch_losses.tolist()):
                mine[self._first_sample + (number * ranks + rank) * size] = (loss, tokens)
        if math.isfinite(result.loss) and not result.spike:
            return []  # a gradient's micro-batch is not known
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
        print(line, flush=True)


def gather_losses(mine: dict[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    """(summed loss, tokens) of every micro-batch by its first sample; ranks that share sequences know parts of both."""
    merged: dict[int, tuple[float, float]] = {}
    for first, (loss, tokens) in (entry for rank in gather(mine) for entry in rank.items()):
        known_loss, known_tokens = merged.get(first, (0.0, 0.0))
        merged[first] = known_loss + loss, known_tokens + tokens
    return merged


def worst(losses: dict[int, tuple[float, float]], finite: bool) -> list[int]:
    """First samples of the micro-batches whose loss is not finite or, where the sum is, of the highest a token."""
    if finite:
        return [max(losses, key=lambda first: losses[first][0] / max(losses[first][1], 1.0))]
    return sorted(first for first, (loss, _) in losses.items() if not math.isfinite(loss))


@torch.no_grad()
def weights_are_finite(model: RankModel) -> bool:
    """Whether no weight of any rank is NaN or infinite; every rank must ask."""
    model.complete_weights()
    parameters = [parameter for module in model.modules for parameter in module.parameters()]
    finite = torch.stack([parameter.isfinite().all() for parameter in parameters]).all().item() if parameters else True
    return not largest(not finite)


def _description(result: StepResult) -> str:
    if result.spike:
        what = f"loss {result.loss:.4f} is a spike"
    elif not math.isfinite(result.loss):
        what = f"loss is {result.loss}"
    else:
        what = f"loss {result.loss:.4f}, but the gradient's norm is {result.update.grad_norm}"
    return f"{what}, weights {'updated' if result.update.applied else 'unchanged'}"


def _origins(trainer: Trainer, samples: Sequence[int]) -> list[str]:
    """Documents that samples were cut from; nothing where this rank reads no data."""
    dataset = trainer.data.train.dataset if trainer.data.train is not None else None
    return [dataset.origin(sample) for sample in samples] if isinstance(dataset, Samples) else []
