"""Runs with Transformer Engine's layers in ranks that have it, and faults to plant into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from integration_runs import final
from training_runs import TrainingRecord, build_trainer, resume, steps, train, train_and_save

from mesh_megatron.config.run import RunConfig
from mesh_megatron.model import mesh_model, segment, te_linear
from mesh_megatron.parallel.groups import stop_model_parallel


def _call_as_it_is(self: Any, *args: Any, **kwargs: Any) -> Any:
    return super(te_linear.AddsUpLoops, self).forward(*args, **kwargs)


FAULTS = {
    "the first call overwrites": (te_linear.AddsUpLoops, "forward", _call_as_it_is),
    "a context for each block": (mesh_model, "forward_fp8_context", lambda config: nullcontext()),
    "a mark for each segment": (segment, "after_segment", lambda config: None),
}


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    with ExitStack() as stack:
        if fault is not None:
            stack.enter_context(mock.patch.object(*FAULTS[fault]))
        yield


def with_engine(run: RunConfig) -> RunConfig:
    return replace(run, parallel=replace(run.parallel, transformer_impl="transformer_engine"))


def train_with_engine(run: RunConfig, fault: str | None = None) -> TrainingRecord:
    with planted(fault):
        return train(with_engine(run), with_gradients=True, evaluate=True)


def losses_in_two_parts(run: RunConfig, count: int) -> tuple[list[float], list[float]]:
    """Losses of all of ``run``, and of the same in two parts: ``count`` steps, and the rest from their checkpoint."""
    run = with_engine(run)
    complete = train(run).losses
    stop_model_parallel()
    first = train_and_save(run, count)
    stop_model_parallel()
    return complete, [*first, *resume(run, final(Path(str(run.checkpoint.save))))]


@dataclass(frozen=True)
class History:
    """What delayed scaling noted of one product of the core in one forward and backward pass."""

    largest: list[float]
    """The largest input of each loop."""
    forward: np.ndarray
    """Entries of the history of inputs."""
    backward: np.ndarray
    """Entries of the history of output gradients."""


def history_of_a_pass(run: RunConfig, fault: str | None = None) -> History:
    trainer = build_trainer(with_engine(run))
    projection = trainer.model.modules[0].block(1).layers[0].self_attention.linear_proj
    largest: list[float] = []
    projection.register_forward_pre_hook(lambda _, args: largest.append(args[0].abs().max().item()))
    with planted(fault):
        steps(trainer, 1)
    meta = projection.fp8_meta
    forward, backward = (meta[f"scaling_{way}"].amax_history[:, 0].numpy() for way in ("fwd", "bwd"))
    return History(largest, forward[forward > 0], backward[backward > 0])
