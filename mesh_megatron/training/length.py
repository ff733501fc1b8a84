"""Where a run starts and where it ends, when the checkpoint it continues may have been trained in other batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesh_megatron.config.run import RunConfig
from mesh_megatron.training.checkpoint_folder import read_run_config, same_folder


@dataclass(frozen=True, kw_only=True)
class Length:
    """A run from here to its end."""

    iteration: int
    """Steps taken so far."""
    consumed_samples: int
    """Sequences they read."""
    total_iters: int
    """Steps taken at the end, with the batches of today from here on."""
    total_samples: int
    """Sequences read at the end."""
    schedule_position: int
    """How far the learning rate's schedule is, in sequences of today's batches."""


def length_of(run: RunConfig, world_size: int, source: Path | None) -> Length:
    """The length of ``run``, continued from the checkpoint ``source`` (None: from its beginning).

    A length in sequences or tokens is kept, in however many steps that takes. A length in steps is kept too. Where that
    or ``--lr-decay-iters`` is given, the learning rate of a step is what it would be had every step had today's batch.
    """
    iteration = consumed = 0
    if source is not None and not starts_anew(run, source):
        progress = read_run_config(source)["resolved"]
        iteration, consumed = progress["iteration"], progress["consumed_samples"]
    training, data_parallel = run.training, run.parallel.data_parallel_size(world_size)
    batch = training.batch_size(data_parallel)
    total = training.total_iters(data_parallel, run.model.seq_length, iteration, consumed)
    in_steps = training.train_iters is not None or training.lr_decay_iters is not None
    return Length(
        iteration=iteration,
        consumed_samples=consumed,
        total_iters=total,
        total_samples=training.samples_after(total - iteration, batch, consumed),
        schedule_position=training.samples_after(iteration, batch) if in_steps else consumed,
    )


def starts_anew(run: RunConfig, source: Path) -> bool:
    """Whether of ``source`` the weights only are taken: ``--finetune``, but for a checkpoint of that run itself."""
    return run.checkpoint.finetune and not same_folder(source.parent, run.checkpoint.save)
