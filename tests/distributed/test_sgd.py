"""Gradient descent with momentum under the law of layouts, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import test_layouts
from cases import PP2, SMALLER, SP, TP2, Case, only_in_full
from rank_pool import RankPool
from test_checkpoints import BEFORE, run_of, tensors_in
from training_runs import resume, train, train_and_save

from mesh_megatron.checkpoint.folder import folder_of

SGD = "--optimizer sgd --lr 2e-2 --weight-decay 0.1 --sgd-momentum 0.8"
ONE, LARGEST = Case("one", 1), Case("pp2-dp2", 4, f"{PP2} {SMALLER}")
CASES = [Case("pp2-dp2", 4, LARGEST.layout, SGD, steps=5)]
MORE_CASES = [Case("tp2-sp", 2, f"{TP2} {SP}", f"{SGD} --router-lr-mult 0.5", steps=5)]


@pytest.mark.parametrize("case", [*CASES, *only_in_full(MORE_CASES)], ids=lambda case: case.name)
def test_same_training(case: Case, ranks: RankPool, one_process: Callable) -> None:
    test_layouts.test_same_training(case, ranks, one_process)


def first_steps(case: Case, ranks: RankPool, save: Path, model: str) -> Path:
    ranks.run(case.ranks, train_and_save, run_of(case, model, save), BEFORE)
    return folder_of(save, BEFORE)


@pytest.mark.full
def test_checkpoints(ranks: RankPool, one_process: Callable, tmp_path: Path) -> None:
    """To the bit under the same layout in bfloat16, within rounding under another; not to or from AdamW."""
    run = run_of(LARGEST, f"{SGD} --bf16")
    uninterrupted = ranks.run(LARGEST.ranks, train, run)[0].losses
    source = first_steps(LARGEST, ranks, tmp_path / "bf16", f"{SGD} --bf16")
    for losses in ranks.run(LARGEST.ranks, resume, run, source):
        assert losses == uninterrupted[BEFORE:]
    kinds = {name.split(".")[1] for name in tensors_in(source) if name.startswith("optimizer.")}
    assert kinds == {"momentum_buffer", "main"}
    exact = first_steps(LARGEST, ranks, tmp_path / "fp32", SGD)
    (losses,) = ranks.run(1, resume, run_of(ONE, SGD), exact)
    np.testing.assert_allclose(losses, one_process(run_of(ONE, SGD)).losses[BEFORE:], rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="--optimizer: the checkpoint has no exp_avg of .*--no-load-optim"):
        ranks.run(1, resume, run_of(ONE), exact)
    with pytest.raises(RuntimeError, match="--optimizer: the checkpoint has no momentum_buffer of"):
        ranks.run(1, resume, run_of(ONE, SGD), first_steps(ONE, ranks, tmp_path / "adam", ""))


@pytest.mark.parametrize("flag", ["--use-distributed-optimizer", "--use-torch-fsdp2"])
def test_shared_state_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag} does not work with --optimizer sgd"):
        run_of(Case("dp2", 2, f"{flag} {SMALLER}"), SGD).validate(2)
