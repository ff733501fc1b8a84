"""``--probe-interval`` logs the same numbers however the ranks are laid out, and changes no step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from cases import CP2, DISTOPT, PP2, SP, TP2, Case, only_nightly, run_config
from rank_pool import RankPool
from training_runs import Records, build_trainer

from mesh_megatron.config.run import RunConfig
from mesh_megatron.parallel.groups import on_first_stage
from mesh_megatron.training.callbacks.mesh_probes import MeshProbes
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer

pytestmark = pytest.mark.full

STEPS, INTERVAL = 4, 2
CASES = [
    Case("cp2", 2, CP2),
    Case("dp2", 2, DISTOPT),
    Case("pp2-three-loops", 2, PP2, "--layout 2+2R3+2 --micro-batch-size 1"),
    Case("ep2-experts", 2, "--expert-model-parallel-size 2", "--num-experts 4"),
    Case("tp2-sp-pp2", 4, f"{TP2} {SP} {PP2}"),
]
RARE_CASES = [
    Case("pp2-full-recompute-residual", 2, f"{PP2} --recompute-granularity full", "--recurrence residual"),
    Case("pp2-cp2", 4, f"{PP2} {CP2}"),
    Case("tp2", 2, TP2),
    Case("tp2-sp", 2, f"{TP2} {SP}"),
    Case("pp2-plain-model", 2, PP2, "--recurrence vanilla --layout 4"),
]


class Losses(Callback):
    """Evaluates between the steps, as training does, and keeps their losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.losses.append(result.loss)
        trainer.evaluate(trainer.data.valid["validation"])


def probed_training(run: RunConfig, interval: int | None) -> tuple[list[Mapping[str, Any]], list[float]]:
    """Records that were logged, and the losses of the steps."""
    trainer, records, losses = build_trainer(run), Records(), Losses()
    trainer.callbacks = [losses] if interval is None else [MeshProbes(records, interval), losses]
    trainer.train()
    if on_first_stage():
        assert "leave" not in vars(trainer.model.modules[0].recurrence), "the methods of the scheme were not restored"
    return records.written, losses.losses


@pytest.fixture(scope="module")
def one_process(ranks: RankPool) -> Callable[[str], list[Mapping[str, Any]]]:
    """Return one process's records of a model; computed once."""

    @functools.cache
    def records(model: str) -> list[Mapping[str, Any]]:
        return ranks.run(1, probed_training, run_config(model, steps=STEPS), INTERVAL)[0][0]

    return records


def test_records_and_losses_of_one_process(ranks: RankPool):
    run = run_config("--layout 2+2R3+2", steps=STEPS)
    [(records, losses)] = ranks.run(1, probed_training, run, INTERVAL)
    assert [record["iteration"] for record in records] == [2, 4]
    groups: dict[str, list[str]] = {}
    for name in records[0]:
        if name != "iteration":
            groups.setdefault(name.split("/")[0], []).append(name.split("/")[1])
    assert groups["state norm"] == ["h_emb", "h(0)", "h(1)", "h(2)", "h(3)"]
    assert groups["update magnitude"] == ["prelude", "loop 0", "loop 1", "loop 2"]
    assert len(groups["router write"]) == len(groups["router read"]) == 4 * 6
    assert groups["router write entropy"] == groups["router read entropy"] == [f"cycle {cycle}" for cycle in range(4)]
    for kind in ("write", "read"):
        for cycle in range(4):
            assert sum(records[1][f"router {kind}/cycle {cycle} slot {slot}"] for slot in range(6)) == pytest.approx(1)
    assert records[0] != records[1]
    [(nothing, same)] = ranks.run(1, probed_training, run, None)
    assert nothing == [] and same == losses


@pytest.mark.parametrize("case", [*CASES, *only_nightly(RARE_CASES)], ids=lambda case: case.name)
def test_same_numbers_on_every_layout(case: Case, ranks: RankPool, one_process: Callable):
    expected = one_process(case.model)
    layout = run_config(case.model, case.layout, steps=STEPS)
    layout.validate(case.ranks)
    actual, _ = ranks.run(case.ranks, probed_training, layout, INTERVAL)[0]
    assert len(actual) == len(expected) == STEPS // INTERVAL
    for here, there in zip(actual, expected, strict=True):
        assert here == pytest.approx(there, rel=1e-5)
