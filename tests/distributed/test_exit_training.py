"""Training with an exit gate: its log, its second stage, and checkpoints of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rank_preload  # noqa: F401  (before megatron.core)
import torch
from cases import BUCKETS, CP2, GATE, GATE_ONLY, OVERLAP, PP2, SP, TP2, run_config
from integration_runs import weights
from rank_pool import RankPool
from training_runs import build_trainer, checkpointer_of, resume, resumed_trainer, train, train_and_save

from mesh_megatron.checkpoint.folder import folder_of
from mesh_megatron.config.run import RunConfig

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

BEFORE, AFTER = 3, 3
SHARDED = f"{OVERLAP} {BUCKETS}"
FAST = "--lr 1e-2"


def run_of(model: str, layout: str = "", save: Path | None = None, finetune: bool = False) -> RunConfig:
    run = run_config(model, layout, BEFORE + AFTER)
    return dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save=save, finetune=finetune))


def logged(run: RunConfig) -> list[dict[str, float]]:
    trainer = build_trainer(run)
    results = [trainer.step()]
    trainer.evaluate(trainer.data.valid["validation"])  # a ring runs other chunks for it
    results += [trainer.step() for _ in range(2)]
    return [{"lm loss": result.loss, **result.exits} for result in results]


@pytest.mark.parametrize(
    "layout",
    [PP2, *(pytest.param(layout, marks=pytest.mark.full) for layout in (SHARDED, f"{TP2} {SP} {CP2}"))],
    ids=["pp2", "dp2", "tp2-sp-cp2"],
)
def test_the_log_is_that_of_one_process(layout: str, ranks: RankPool) -> None:
    [expected] = ranks.run(1, logged, run_config(GATE_ONLY))
    for found in ranks.run(4 if CP2 in layout else 2, logged, run_config(GATE_ONLY, layout)):
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.keys() == theirs.keys()
            assert mine == pytest.approx(theirs, abs=1e-5)
    for step in expected:
        shares = [step[f"exit share/loop {loop}"] for loop in (1, 2, 3)]
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        assert step["exit loop"] == pytest.approx(shares[0] + 2 * shares[1] + 3 * shares[2])
        losses = [step[f"loop loss/loop {loop}"] for loop in (1, 2, 3)]
        assert min(losses) < step["lm loss"] < max(losses)
        assert 0 < step["exit entropy"] < np.log(3)


@pytest.mark.full
def test_weights_of_loops_log_their_losses(ranks: RankPool) -> None:
    [found] = ranks.run(1, logged, run_config("--layout 2+2R2+2 --loop-loss-weights 1 3"))
    for step in found:
        assert step.keys() == {"lm loss", "loop loss/loop 1", "loop loss/loop 2"}
        assert step["lm loss"] == pytest.approx((step["loop loss/loop 1"] + 3 * step["loop loss/loop 2"]) / 4, abs=1e-6)


def test_losses_of_routers_that_do_not_learn_change_nothing(ranks: RankPool) -> None:
    expected, found = (ranks.run(1, logged, run_config(f"{GATE_ONLY} {more}"))[0] for more in ("", "--router-z-loss 1"))
    assert found == expected


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The checkpoint that one process, or the two ranks of a layout, wrote after ``BEFORE`` steps; written once."""
    known: dict[tuple[str, str], Path] = {}

    def checkpoint(model: str, layout: str = "") -> Path:
        if (model, layout) not in known:
            save = tmp_path_factory.mktemp("saved")
            ranks.run(2 if layout else 1, train_and_save, run_of(model, layout, save), BEFORE)
            known[model, layout] = folder_of(save, BEFORE)
        return known[model, layout]

    return checkpoint


@pytest.mark.parametrize("model", [GATE, *(pytest.param(model, marks=pytest.mark.full) for model in (GATE_ONLY,))])
def test_continues_as_if_never_interrupted(
    model: str, ranks: RankPool, saved: Callable[[str], Path], one_process: Callable
) -> None:
    """To the bit under the same layout, within 1e-5 under others."""
    model = f"{model} {FAST}"
    uninterrupted = one_process(run_of(model)).losses[BEFORE:]
    assert ranks.run(1, resume, run_of(model), saved(model))[0] == uninterrupted
    for layout in (f"{TP2} {SP}", SHARDED, PP2):
        for losses in ranks.run(2, resume, run_of(model, layout), saved(model)):
            np.testing.assert_allclose(losses, uninterrupted, rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("model", [f"{GATE} --loops-sampling uniform", GATE_ONLY], ids=["drawn loops", "gate only"])
def test_a_ring_continues_to_the_bit(model: str, ranks: RankPool, saved: Callable[..., Path]) -> None:
    """One process continues from its checkpoint too, within 1e-5."""
    model = f"{model} {FAST}"
    uninterrupted = ranks.run(2, train, run_of(model, PP2))[0].losses[BEFORE:]
    for losses in ranks.run(2, resume, run_of(model, PP2), saved(model, PP2)):
        assert losses == uninterrupted
    [alone] = ranks.run(1, resume, run_of(model), saved(model, PP2))
    np.testing.assert_allclose(alone, uninterrupted, rtol=0, atol=1e-5)


def second_stage(run: RunConfig, checkpoint: Path) -> tuple[float, float]:
    """Gate's loss on the first batch, and once more after ``AFTER`` steps from ``checkpoint`` and a save."""
    trainer = resumed_trainer(run, checkpoint)
    before = [trainer.step().exits["exit gate loss"] for _ in range(AFTER)][0]
    checkpointer = checkpointer_of(trainer)
    checkpointer.save()
    checkpointer.close()
    trainer.state.consumed_samples = 0
    return before, trainer.step().exits["exit gate loss"]


@pytest.mark.parametrize(
    ("first", "layout", "precision"),
    [
        ("--layout 2+2R3+2", "", ""),
        pytest.param("--layout 2+2R3+2", SHARDED, "--bf16", marks=pytest.mark.full),
        pytest.param(GATE, f"{TP2} {SP}", "", marks=pytest.mark.full),
        pytest.param("--layout 2+2R3+2", PP2, "--bf16", marks=pytest.mark.full),
    ],
    ids=["without gate", "without gate, dp2 in bfloat16", "with gate, tp2-sp", "without gate, pp2 in bfloat16"],
)
def test_the_second_stage_changes_the_gate_alone(
    first: str, layout: str, precision: str, ranks: RankPool, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    source = saved(f"{first} {precision} {FAST}")
    run = run_of(f"{GATE_ONLY} {precision} {FAST}", layout, tmp_path, finetune=True)
    for untrained, trained in ranks.run(2 if layout else 1, second_stage, run, source):
        assert trained < untrained
    before, after = weights(source), weights(folder_of(tmp_path, AFTER))
    frozen = {n: tensor for n, tensor in before.items() if not n.startswith(("optimizer.", "rng", "recurrence.exit"))}
    assert len(frozen) > 20
    for name, tensor in frozen.items():
        assert torch.equal(after[name], tensor), name
    states = {name for name in after if name.startswith("optimizer.exp_avg.")}
    assert states == {"optimizer.exp_avg.recurrence.exit_gate.weight", "optimizer.exp_avg.recurrence.exit_gate.bias"}
    assert after["recurrence.exit_gate.bias"].any()
