"""Numbers that go wrong on one rank: every rank skips the step, and nothing poisoned is saved."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BUCKETS, OVERLAP, PP2, SMALLER, SP, TP2, Case, run_config
from rank_pool import RankPool
from torch import Tensor
from training_runs import Records, build_trainer, checkpointer_of, resumed_trainer

from mesh_megatron.checkpoint.folder import saved_iterations
from mesh_megatron.checkpoint.optimizer_state import sub_optimizers
from mesh_megatron.config.run import RunConfig
from mesh_megatron.platform import device
from mesh_megatron.training import step
from mesh_megatron.training.callbacks.bad_steps import BadSteps
from mesh_megatron.training.callbacks.checkpointing import Checkpointing
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer

pytestmark = pytest.mark.full

STEPS, AT = 6, 3
MICRO_BATCH = 1  # of the faulty rank, whose loss is wrong


@dataclass(frozen=True)
class Outcome:
    """One rank's record of a run."""

    losses: list[float]
    changed: list[bool]
    """For each step, True if it changed weights or optimizer state on this rank."""
    final: str
    """Digest of both at the end."""
    records: list[Mapping[str, Any]]


class Watch(Callback):
    """Compares weights and optimizer state before and after every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.changed: list[bool] = []

    def before_step(self, trainer: Trainer) -> None:
        self._before = everything(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        now = everything(trainer)
        same = len(now) == len(self._before) and all(map(same_bits, now, self._before))
        self.changed.append(not same)
        self.losses.append(result.loss)


def everything(trainer: Trainer) -> list[Tensor]:
    """Copies of this rank's weights, main weights and moments."""
    trainer.model.complete_weights()
    tensors: list[Tensor] = [p for module in trainer.model.modules for p in module.parameters()]
    for part in sub_optimizers(trainer.optimizer):
        inner: Any = part.optimizer
        tensors += [p for group in inner.param_groups for p in group["params"]]
        tensors += [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def train_with(run: RunConfig, fault: str | None, faulty_rank: int) -> Outcome:
    trainer, watch, records = build_trainer(run), Watch(), Records()
    trainer.callbacks = [watch, BadSteps(records if device.rank() == 0 else None)]
    original = step._loss
    if fault is not None and device.rank() == faulty_rank:
        _break_gradient(trainer) if fault == "gradient" else _break_loss(trainer)
    try:
        trainer.train()
    finally:
        step._loss = original
    digest = hashlib.sha256(b"".join(bits(tensor).numpy().tobytes() for tensor in everything(trainer)))
    assert trainer.state.nan_steps == trainer.state.skipped_steps == (fault is not None)
    return Outcome(watch.losses, watch.changed, digest.hexdigest(), records.written)


def _break_gradient(trainer: Trainer) -> None:
    named = [pair for module in trainer.model.modules for pair in module.named_parameters()]
    norm = next(parameter for name, parameter in named if "norm" in name)
    norm.register_hook(lambda gradient: gradient * math.nan if trainer.state.iteration == AT - 1 else gradient)


def _break_loss(trainer: Trainer) -> None:
    original, seen = step._loss, []

    def broken(mask: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, tokens, report = original(mask, total)
        if trainer.state.iteration == AT - 1:
            seen.append(total)
            if len(seen) == MICRO_BATCH + 1:
                total, report = total * math.nan, report * math.nan
        return total, tokens, report

    step._loss = broken


@pytest.mark.parametrize(
    ("case", "fault", "faulty_rank", "suspects"),
    [
        (Case("dp2", 2, SMALLER), "loss", 1, [22, 23]),  # of 16 to 23, dealt in turn two by two
        (Case("dp2-distopt-overlap-buckets-bf16", 2, f"{OVERLAP} {BUCKETS}", "--bf16"), "gradient", 1, None),
        pytest.param(Case("pp2", 2, PP2), "gradient", 0, None, marks=pytest.mark.long),
        (Case("pp2", 2, PP2), "loss", 1, [18, 19]),
        (Case("tp2-sp", 2, f"{TP2} {SP}"), "gradient", 1, None),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else None,
)
def test_bad_step_changes_nothing_anywhere(
    case: Case, fault: str, faulty_rank: int, suspects: list[int] | None, ranks: RankPool
) -> None:
    bad = ranks.run(case.ranks, train_with, run_config(case.model, case.layout, STEPS), fault, faulty_rank)
    passing = run_config(f"{case.model} --iterations-to-skip {AT}", case.layout, STEPS)
    passed = ranks.run(case.ranks, train_with, passing, None, 0)
    for here, there in zip(bad, passed, strict=True):
        assert here.changed == there.changed == [number != AT for number in range(1, STEPS + 1)]
        assert math.isnan(here.losses[AT - 1]) == (fault == "loss")
        others = [number for number in range(STEPS) if number != AT - 1]
        assert [here.losses[i] for i in others] == [there.losses[i] for i in others]
        assert here.final == there.final
    [record], [passed_over] = bad[0].records, passed[0].records
    assert record["iteration"] == passed_over["iteration"] == AT
    assert record["samples"] == passed_over["samples"] == [16, 23]
    assert record.get("suspicious samples") == suspects
    assert passed_over["event"] == "passed over (--iterations-to-skip)"


class Poison(Callback):
    """Puts NaN into a weight of the last rank after step 3."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.state.iteration == 3 and device.rank() == device.world_size() - 1:
            with torch.no_grad():
                next(trainer.model.modules[0].parameters()).view(-1)[0] = math.nan


def poisoned_training(run: RunConfig) -> tuple[int, int, str | None]:
    trainer = build_trainer(run)
    trainer.callbacks = [Poison(), BadSteps(None), Checkpointing(checkpointer_of(trainer))]
    trainer.train()
    return trainer.state.iteration, trainer.exit_code, trainer.stop_reason


@pytest.mark.parametrize(
    ("interval", "stopped", "reason", "saved"),
    [(2, 6, "3 bad steps in a row (--max-bad-steps)", [2]), (1, 3, "weights are not finite", [1, 2])],
)
def test_no_checkpoint_of_a_poisoned_state(
    interval: int, stopped: int, reason: str, saved: list[int], ranks: RankPool, tmp_path: Path
) -> None:
    run = run_config("--max-bad-steps 3", "", 20)
    settings = dataclasses.replace(run.checkpoint, save=tmp_path, save_interval=interval)
    for iteration, code, why in ranks.run(2, poisoned_training, dataclasses.replace(run, checkpoint=settings)):
        assert (iteration, code) == (stopped, 3) and reason in str(why)
    assert saved_iterations(tmp_path) == saved


def spikes(run: RunConfig, source: Path | None, steps: int) -> tuple[list[bool], dict[int, list[float]]]:
    """Take ``steps`` steps, from ``source`` if given, then save; whether each was a spike, and the losses kept."""
    trainer = resumed_trainer(run, source) if source is not None else build_trainer(run)
    found = [trainer.step().spike for _ in range(steps)]
    checkpointer = checkpointer_of(trainer)
    checkpointer.save()
    checkpointer.close()
    return found, trainer.state.recent_by_loops


def test_losses_by_number_of_loops_survive_a_restart(ranks: RankPool, tmp_path: Path) -> None:
    """A restart goes on with the losses of each number of loops."""
    flags = (
        "--layout 1+1R4+1 --recurrence residual --loops-sampling uniform --loss-spike-factor 1.01 --loss-spike-window 2"
    )
    run = run_config(flags, "", 16)
    first, second = (
        dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save=tmp_path / name))
        for name in ("once", "twice")
    )
    [(expected, kept)] = ranks.run(1, spikes, first, None, 16)
    [(before, _)] = ranks.run(1, spikes, second, None, 8)
    [(after, kept_too)] = ranks.run(1, spikes, second, tmp_path / "twice" / "iter_0000008", 8)
    assert before + after == expected and kept_too == kept
    assert kept.keys() <= {1, 2, 3, 4} and len(kept) > 1 and all(len(losses) <= 2 for losses in kept.values())
