"""Biases of experts: equal losses and biases under every layout of ranks, their formula, checkpoints, skipped steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_layouts
import torch
from cases import CP2, DRAWN, FULL, PP2, SP, TP2, Case, only_in_full, only_nightly, run_config
from rank_pool import RankPool
from test_moe import EP2, ETP1, EXPERTS, OVERLAP, SIGMOID
from training_runs import build_trainer, checkpointer_of, resume, resumed_trainer, train

from mesh_megatron.config.run import RunConfig
from mesh_megatron.training import step as steps
from mesh_megatron.training.expert_bias import _biased_routers
from mesh_megatron.training.optimizer import Update
from mesh_megatron.training.trainer import Trainer

# A rate that moves tokens to other experts within the few steps of a test.
RATE = 0.01
BIAS = (
    f"{EXPERTS} {SIGMOID} --moe-aux-loss-coeff 0 --moe-router-enable-expert-bias --moe-router-bias-update-rate {RATE}"
)
CASES = [
    Case("ep2-pp2-distopt-overlap-full-recompute", 4, f"{EP2} {PP2} {OVERLAP} {FULL}", BIAS),
]
MORE_CASES = [Case("cp2", 2, CP2, f"{BIAS} --moe-router-num-groups 2 --moe-router-group-topk 2", steps=5)]
RARE_CASES = [
    Case("tp2-sp-ep2-etp1", 2, f"{TP2} {SP} {ETP1} {EP2}", BIAS),
    Case(
        "pp2-recomputed-experts", 2, f"{PP2} --recompute-granularity selective --recompute-modules moe", BIAS, steps=5
    ),
    Case("ep2-pp2-drawn-loops", 4, f"{EP2} {PP2}", f"{BIAS} {DRAWN}", steps=5),
]


def biases(trainer: Trainer) -> dict[str, list[float]]:
    """This rank's biases by the checkpoint name of their layer."""
    found = {}
    for module in trainer.model.modules:
        for entry in module.sharded_state_dict().values():
            if entry.key.endswith("expert_bias"):
                found[entry.key] = entry.data.tolist()
    return found


def trained_biases(run: RunConfig) -> dict[str, list[float]]:
    trainer = build_trainer(run)
    for _ in range(trainer.total_iters):
        trainer.step()
    trainer.evaluate(trainer.data.valid["validation"])
    return biases(trainer)


@pytest.mark.parametrize(
    "case", [*CASES, *only_in_full(MORE_CASES), *only_nightly(RARE_CASES)], ids=lambda case: case.name
)
def test_same_training_and_biases(case: Case, ranks: RankPool, one_process: Callable) -> None:
    test_layouts.test_same_training(case, ranks, one_process)
    (expected,) = ranks.run(1, trained_biases, run_config(case.model, steps=case.steps))
    assert len(expected) == 2 and all(any(values) for values in expected.values())
    seen: set[str] = set()
    for actual in ranks.run(case.ranks, trained_biases, run_config(case.model, case.layout, case.steps)):
        seen |= actual.keys()
        for name, values in actual.items():
            assert values == pytest.approx(expected[name], abs=1e-7), name
    assert seen == expected.keys()


def biases_and_choices(run: RunConfig) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """After each of four steps, the first router's biases and its tokens per expert; the third step is skipped."""
    trainer = build_trainer(run)
    (router, *_) = _biased_routers(trainer.model)
    counts = torch.zeros(run.model.num_experts or 0)

    def count(router: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        counts.add_(output[1].sum(0))

    router.register_forward_hook(count)
    update, found = steps.update_weights, []
    for number in range(4):
        counts.zero_()
        if number == 2:
            steps.update_weights = lambda *_: Update(float("inf"), "not finite")
        result = trainer.step()
        steps.update_weights = update
        found.append((router.expert_bias.numpy().copy(), counts.numpy().copy(), result.update.applied))
    return found


def test_a_bias_rises_where_tokens_are_missing_and_a_skipped_step_leaves_it(ranks: RankPool) -> None:
    (found,) = ranks.run(1, biases_and_choices, run_config(BIAS))
    before = np.zeros(4, np.float32)
    for bias, tokens, applied in found:
        assert tokens.sum() == 8 * 32 * 2 * 2  # of both experts and loops
        change = RATE * np.sign(tokens.mean() - tokens) if applied else 0
        np.testing.assert_allclose(bias, before + change, atol=1e-7)
        before = bias
    assert [applied for _, _, applied in found] == [True, True, False, True]


def saved_biases(run: RunConfig, count: int) -> dict[str, list[float]]:
    trainer = build_trainer(run)
    for _ in range(count):
        trainer.step()
    checkpointer_of(trainer).save()
    return biases(trainer)


def loaded_biases(run: RunConfig, source: Path) -> dict[str, list[float]]:
    return biases(resumed_trainer(run, source))


@pytest.mark.full
def test_checkpoints_have_them(ranks: RankPool, tmp_path: Path) -> None:
    """To the bit, also under another layout; the same layout continues to the bit."""
    layout = f"{EP2} {PP2}"
    run = run_config(BIAS, layout)
    saved = ranks.run(4, saved_biases, run_config(BIAS, f"{layout} --save {tmp_path}"), 5)
    expected = {name: values for found in saved for name, values in found.items()}
    source = tmp_path / "iter_0000005"
    (loaded,) = ranks.run(1, loaded_biases, run_config(BIAS), source)
    assert loaded == expected
    uninterrupted = ranks.run(4, train, run)[0].losses
    for losses in ranks.run(4, resume, run, source):
        assert losses == uninterrupted[5:]
