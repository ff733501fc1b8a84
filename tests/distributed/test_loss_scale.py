"""fp16 has one loss scale a model: the same for all parts of its optimizer, on all ranks, under any layout."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CP2, DISTOPT, OVERLAP, PP2, SP, TP2, Case, only_nightly, run_config
from rank_pool import RankPool
from test_moe import EP2, ETP1, EXPERTS
from training_runs import build_trainer, checkpointer_of, resumed_trainer

from mesh_megatron.checkpoint.folder import folder_of
from mesh_megatron.checkpoint.optimizer_state import sub_optimizers
from mesh_megatron.config.run import RunConfig
from mesh_megatron.platform import device
from mesh_megatron.training.trainer import Trainer

pytestmark = pytest.mark.full

STEPS, BEFORE = 13, 6
# Overflows in the first steps, then rises every third step.
FP16 = f"{EXPERTS} --fp16 --initial-loss-scale 262144 --loss-scale-window 3 --lr 1e-3 --lr-warmup-iters 3"
ONE = Case("one", 1, "", FP16)
LAYOUTS = [
    Case("ep2-distopt-overlap", 2, f"{EP2} {OVERLAP}", FP16),
    Case("tp2-sp-ep2-etp1-distopt", 2, f"{TP2} {SP} {ETP1} {EP2} {DISTOPT}", FP16),
    Case("ep2-pp2", 4, f"{EP2} {PP2}", FP16),
]
RARE_LAYOUTS = [
    Case("ep2", 2, EP2, FP16),
    Case("cp2-ep2", 2, f"{CP2} {EP2}", FP16),
    Case("tp2-sp-etp1", 2, f"{TP2} {SP} {ETP1}", FP16),
]
BY_NAME = {case.name: case for case in [ONE, *LAYOUTS, *RARE_LAYOUTS]}


@dataclass(frozen=True)
class Record:
    """One rank's numbers of each step; NaN where a number was not read."""

    losses: list[float]
    norms: list[float]
    scales: list[float]


def take_steps(trainer: Trainer, count: int) -> Record:
    record = Record([], [], [])
    for _ in range(count):
        result = trainer.step()
        record.losses.append(result.loss)
        record.norms.append(result.update.grad_norm)
        record.scales.append(the_scale(trainer))
    return record


def the_scale(trainer: Trainer) -> float:
    """The loss's scale, which every part of the optimizer must divide by."""
    optimizer: Any = trainer.optimizer
    scale = float(optimizer.get_loss_scale())
    assert [float(part.get_loss_scale()) for part in optimizer.chained_optimizers if part.config.fp16] == [
        scale for _ in optimizer.chained_optimizers
    ]
    return scale


def train(run: RunConfig) -> Record:
    return take_steps(build_trainer(run), STEPS)


def train_and_save(run: RunConfig, count: int) -> None:
    trainer = build_trainer(run)
    take_steps(trainer, count)
    checkpointer = checkpointer_of(trainer)
    checkpointer.save()
    checkpointer.close()


def resume(run: RunConfig, checkpoint: Path) -> Record:
    return take_steps(resumed_trainer(run, checkpoint), STEPS - BEFORE)


def run_of(case: Case, save: Path | None = None, more: str = "") -> RunConfig:
    run = run_config(f"{case.model} {more}", case.layout, STEPS)
    return dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save=save))


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> Record:
    (record,) = ranks.run(1, train, run_of(ONE))
    assert sum(map(math.isinf, record.norms)) >= 3, "no overflow, so the loss scale is never lowered"
    assert record.scales[-1] > min(record.scales), "the loss scale never rises"
    return record


def assert_same(actual: Record, expected: Record, first: int = 0) -> None:
    assert actual.scales == expected.scales[first:]
    np.testing.assert_allclose(actual.losses, expected.losses[first:], rtol=0, atol=2e-3)
    np.testing.assert_allclose(actual.norms, expected.norms[first:], rtol=5e-3)


@pytest.mark.parametrize("case", [*LAYOUTS, *only_nightly(RARE_LAYOUTS)], ids=lambda case: case.name)
def test_scale_and_norms_are_those_of_one_process(case: Case, ranks: RankPool, expected: Record) -> None:
    for record in ranks.run(case.ranks, train, run_of(case)):
        assert_same(record, expected)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param("one", "ep2", marks=pytest.mark.long),
        pytest.param("ep2", "one", marks=pytest.mark.long),
        ("ep2", "tp2-sp-etp1"),
    ],
)
def test_scale_continues_under_another_layout(
    source: str, target: str, ranks: RankPool, expected: Record, tmp_path: Path
) -> None:
    before, after = BY_NAME[source], BY_NAME[target]
    ranks.run(before.ranks, train_and_save, run_of(before, tmp_path), BEFORE)
    for record in ranks.run(after.ranks, resume, run_of(after), folder_of(tmp_path, BEFORE)):
        assert_same(record, expected, BEFORE)


def overflow_in_one_expert(run: RunConfig, rank: int) -> tuple[list[float], bool]:
    """Scales around two steps in which an expert's gradient is infinite on ``rank``, and whether no weight changed."""
    trainer = build_trainer(run)
    held = [parameter for module in trainer.model.modules for parameter in module.parameters()]
    before = [parameter.detach().clone() for parameter in held]
    expert: Any = next(p for module in trainer.model.modules for n, p in module.named_parameters() if ".experts." in n)
    original = trainer.optimizer.prepare_grads

    def prepare_grads() -> bool:
        if device.rank() == rank:
            expert.main_grad.view(-1)[0] = math.inf
        return original()

    trainer.optimizer.prepare_grads = prepare_grads  # type: ignore[method-assign]
    scales = [the_scale(trainer)]
    for _ in range(2):
        assert trainer.step().update.skipped == "overflow"
        scales.append(the_scale(trainer))
    return scales, all(bool((a == b).all()) for a, b in zip(before, held, strict=True))


@pytest.mark.parametrize("layout", [f"{EP2} --global-batch-size 16", f"{TP2} {SP} {ETP1}"])
def test_an_overflow_of_one_expert_on_one_rank_is_everyones(layout: str, ranks: RankPool) -> None:
    run = run_config(f"{EXPERTS} --fp16 --initial-loss-scale 64", layout)
    for scales, unchanged in ranks.run(2, overflow_in_one_expert, run, 1, timeout=120):
        assert scales == [64.0, 64.0, 32.0]  # Megatron-Core's hysteresis: the second falls
        assert unchanged


def scales_after(run: RunConfig, checkpoint: Path) -> list[float]:
    return resume(run, checkpoint).scales


@pytest.mark.parametrize(
    ("before", "after", "scales"),
    [
        # Six steps without overflow are more than today's window: the next one completes it.
        ("--initial-loss-scale 8 --loss-scale-window 100", "--loss-scale-window 3", [16.0] * 3 + [32.0] * 3 + [64.0]),
        pytest.param(
            *("--initial-loss-scale 8 --loss-scale-window 100", "--min-loss-scale 64 --loss-scale-window 100"),
            [64.0] * 7,
            marks=pytest.mark.long,
        ),
        ("--loss-scale 8", "--initial-loss-scale 32 --loss-scale-window 100", [32.0] * 7),
        pytest.param("--initial-loss-scale 8", "--loss-scale 32", [32.0] * 7, marks=pytest.mark.long),
    ],
    ids=["shorter-window", "higher-least-scale", "constant-to-dynamic", "dynamic-to-constant"],
)
def test_settings_of_the_scale_may_change(
    before: str, after: str, scales: list[float], ranks: RankPool, tmp_path: Path
) -> None:
    model = f"{EXPERTS} --fp16"
    ranks.run(2, train_and_save, run_of(Case("", 2, EP2, f"{model} {before}"), tmp_path), BEFORE)
    run = run_of(Case("", 2, EP2, f"{model} {after}"))
    for actual in ranks.run(2, scales_after, run, folder_of(tmp_path, BEFORE)):
        assert actual == scales


def doubles(run: RunConfig) -> dict[str, int]:
    """Count the different values, over the parts of a chained optimizer, of quantities that a model has once."""
    trainer = build_trainer(run)
    take_steps(trainer, 8)
    held = sub_optimizers(trainer.optimizer)
    inner: list[Any] = [part.optimizer for part in held]
    states = [state for optimizer in inner for state in optimizer.state.values()]
    groups = [group for optimizer in inner for group in optimizer.param_groups]
    return {
        "parts": len(held),
        "scales": len({id(part.grad_scaler) for part in held}),  # type: ignore[attr-defined]
        "steps": len({int(state["step"]) for state in states}),
        "rates": len({group["lr"] for group in groups}),
        "peaks": len({group["max_lr"] for group in groups}),
        "decays": len({group["weight_decay"] for group in groups if group["wd_mult"]}),
        "configurations": len({id(part.config) for part in held}),
    }


@pytest.mark.parametrize("layout", [EP2, f"{TP2} {SP} {ETP1} {DISTOPT}"])
def test_parts_agree_on_what_a_model_has_once(layout: str, ranks: RankPool) -> None:
    for counts in ranks.run(2, doubles, run_config(FP16, layout, STEPS)):
        assert counts.pop("parts") == 2
        assert counts == dict.fromkeys(counts, 1)
