"""The start and the end of a run that may continue a checkpoint with other batch sizes.

The length of the run, its learning rates and the order of its data depend only on the flags (``--train-iters``,
``--train-samples`` or ``--train-tokens``, each in its own unit). They never depend on numbers derived from the present
batch size and ranks, which may be different at the next start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mesh_megatron.checkpoint.folder import read_run_config, same_folder
from mesh_megatron.config import cli
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.training.progress import Course, course_of


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """The run from its present iteration to its end."""

    iteration: int
    """Steps taken so far."""
    total_iters: int
    """Steps taken at the end, if the batch size stays as it is now."""
    course: Course
    """The complete course, from the first step on."""
    samples: int
    """Position in the data at the end; see ``data_position``."""
    order_samples: int
    """Number of samples for which the order of the data was made at the first start; later changes do not affect it."""


def compute_run_length(run: RunConfig, world_size: int, source: Path | None) -> RunLength:
    """Return the length of ``run``, continued from the checkpoint ``source`` (None: from the beginning)."""
    record = read_run_config(source) if source is not None and not takes_weights_only(run, source) else None
    progress = record["resolved"] if record is not None else {}
    iteration, consumed, tokens = (
        progress.get(name, 0) for name in ("iteration", "consumed_samples", "consumed_tokens")
    )
    training, data_parallel = run.training, run.parallel.data_parallel_size(world_size)
    batch, seq_length = training.batch_size(data_parallel), run.model.seq_length
    total = training.total_iters(data_parallel, seq_length, iteration, consumed, tokens)
    to_come = training.samples_after(total - iteration, batch, seq_length, consumed) - consumed
    turns = progress.get("turns")
    if turns is None:  # a checkpoint written before they were recorded
        planned = course_of(training, batch, seq_length, [[0, 0, 0]]).points
        as_planned = training.samples_after(iteration, batch, seq_length) == consumed
        turns = [point for point in planned if point.steps < iteration] if as_planned else []
    past = [[0, 0, 0], *turns, [iteration, consumed, tokens]]
    return RunLength(
        iteration=iteration,
        total_iters=total,
        course=course_of(training, batch, seq_length, past),
        samples=data_position(training, seq_length, consumed, tokens) + to_come,
        order_samples=_order_samples(training, batch, seq_length, record),
    )


def data_position(training: TrainingConfig, seq_length: int, consumed_samples: int, consumed_tokens: int) -> int:
    """Return the index of the next sample to read.

    With ``--train-tokens`` it is the number of samples of the present ``seq_length`` that the tokens read so far fill.
    """
    return consumed_samples if training.train_tokens is None else -(-consumed_tokens // seq_length)


def takes_weights_only(run: RunConfig, source: Path) -> bool:
    """Return whether only weights are loaded: with ``--finetune``, unless ``source`` was saved by this run itself."""
    return run.checkpoint.finetune and not same_folder(source.parent, run.checkpoint.save)


def _order_samples(training: TrainingConfig, batch: int, seq_length: int, record: dict[str, Any] | None) -> int:
    """Return ``order_samples`` as recorded at the first start; another ``seq_length`` needs a new order."""
    if record is None or record["model"]["seq_length"] != seq_length:
        return training.asked_samples(batch, seq_length)
    resolved = record["resolved"]
    if (known := resolved.get("order_samples")) is not None:
        return known
    # A checkpoint written before this was recorded: its order was made for the samples that its steps read.
    before = cli.from_dict(TrainingConfig, record["training"], "run_config.json")
    before_batch = resolved.get("global_batch_size") or before.global_batch_size or batch
    if (before.train_iters, before.train_samples, before.train_tokens) == (None, None, None):
        return training.asked_samples(batch, seq_length)
    steps = replace(before, global_batch_size=before_batch).total_iters(1, seq_length)
    return before.samples_after(steps, before_batch, seq_length)
