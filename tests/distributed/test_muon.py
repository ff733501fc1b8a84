"""Muon under the law of layouts, and its checkpoints under other layouts; its memory is in test_planned.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import test_layouts
import test_loss_scale
import torch
from cases import CP2, DRAWN, GATED, LLAMA, PP2, SMALLER, SP, TP2, Case, only_in_full, only_nightly, run_config
from megatron.core import parallel_state
from rank_pool import RankPool
from test_checkpoints import BEFORE, run_of, save_again, tensors_in, without_biases_of_keys
from torch.utils.flop_counter import FlopCounterMode
from training_runs import build_trainer, resume, train, train_and_save

from mesh_megatron.checkpoint.folder import folder_of
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.muon import dense_work, expert_work
from mesh_megatron.training import layer_wise

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MUON = "--optimizer muon --lr 2e-3 --muon-extra-scale-factor 0.2 --weight-decay 0.1"
ONE_MATRIX = "--muon-no-split-qkv --muon-nesterov --muon-scale-mode unit_rms_norm"
LAYER_WISE = f"--use-distributed-optimizer {SMALLER}"
EXPERTS = f"--num-experts 4 --moe-aux-loss-coeff 0.1 {SMALLER}"
EP2, ETP1 = "--expert-model-parallel-size 2", "--expert-tensor-parallel-size 1"

CASES = [
    Case("tp2-sp-gated", 2, f"{TP2} {SP}", f"{MUON} {LLAMA}", steps=5),
    Case("pp2-dp2-layer-wise", 4, f"{PP2} {LAYER_WISE}", f"{MUON} --muon-scalar-lr 1e-3 --router-lr-mult 0.5", steps=5),
]
MORE_CASES = [
    Case("tp2", 2, TP2, f"{MUON} --loop-norm --loop-embedding --hidden-dropout 0.1", steps=5),
    Case("tp2-one-qkv", 2, TP2, f"{MUON} {GATED} {ONE_MATRIX}", steps=5),
    Case("dp4-layer-wise-overlap", 4, f"{LAYER_WISE} --overlap-grad-reduce --ddp-bucket-size 10000", MUON, steps=5),
    Case("pp2-dp2-layer-wise-drawn-loops", 4, f"{PP2} {LAYER_WISE}", f"{MUON} {DRAWN}", steps=5),
    Case("ep2-pp2-layer-wise", 4, f"{EP2} {PP2} {LAYER_WISE}", f"{EXPERTS} {MUON}", steps=5),
]
RARE_CASES = [
    Case("pp2-tied", 2, PP2, f"{MUON} --no-untie-embeddings-and-output-weights", steps=5),
    Case("cp2-layer-wise", 2, f"{CP2} --use-distributed-optimizer", MUON, steps=5),
    Case("dp2", 2, SMALLER, MUON, steps=5),
    Case("tp2-sp-ep2-etp1", 2, f"{TP2} {SP} {ETP1} {EP2}", f"{EXPERTS} {MUON}", steps=5),
]


ALL_CASES = [*CASES, *only_in_full(MORE_CASES), *only_nightly(RARE_CASES)]


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_same_training(case: Case, ranks: RankPool, one_process: Callable) -> None:
    test_layouts.test_same_training(case, ranks, one_process)


BF16_CASE = Case(
    "pp2-dp2-layer-wise-gradients-in-bf16", 4, f"{PP2} {LAYER_WISE} --grad-reduce-in-bf16", f"{MUON} --bf16"
)


@pytest.mark.full
def test_gradients_in_bfloat16(ranks: RankPool, one_process: Callable) -> None:
    test_layouts.test_same_training_within_the_noise_of_bfloat16(BF16_CASE, ranks, one_process)


@pytest.mark.full
@pytest.mark.long
def test_fp16(ranks: RankPool, tmp_path: Path) -> None:
    """Scales, losses and norms of one process, with overflows; to the bit after a restart."""
    model = f"{MUON} {SMALLER} --fp16 --initial-loss-scale 262144 --loss-scale-window 3 --lr-warmup-iters 3"
    largest = Case(LARGEST.name, LARGEST.ranks, LARGEST.layout, model)
    run = test_loss_scale.run_of(largest)
    (expected,) = ranks.run(1, test_loss_scale.train, test_loss_scale.run_of(Case("one", 1, "", model)))
    assert sum(map(np.isinf, expected.norms)) >= 2, "no overflow, so the loss scale is never lowered"
    records = ranks.run(largest.ranks, test_loss_scale.train, run)
    for record in records:
        test_loss_scale.assert_same(record, expected)
    before = test_loss_scale.BEFORE
    ranks.run(largest.ranks, test_loss_scale.train_and_save, test_loss_scale.run_of(largest, tmp_path), before)
    for record in ranks.run(largest.ranks, test_loss_scale.resume, run, folder_of(tmp_path, before)):
        assert record.losses == records[0].losses[before:] and record.scales == records[0].scales[before:]


BEFORE_LAYOUTS = [Case("one", 1), Case("tp2", 2, TP2), Case("pp2-dp2-layer-wise", 4, f"{PP2} {LAYER_WISE}")]
ONE, TENSOR, LARGEST = BEFORE_LAYOUTS


def first_steps(case: Case, ranks: RankPool, save: Path, model: str = MUON) -> Path:
    """A checkpoint that this layout wrote after ``BEFORE`` steps."""
    ranks.run(case.ranks, train_and_save, run_of(case, model, save), BEFORE)
    return folder_of(save, BEFORE)


@pytest.mark.full
def test_a_checkpoint_continues_under_other_layouts(ranks: RankPool, one_process: Callable, tmp_path: Path) -> None:
    """From ranks that share state to one process; and what it holds is what one process writes."""
    source = first_steps(LARGEST, ranks, tmp_path / "largest")
    uninterrupted = one_process(run_of(ONE, MUON)).losses
    (losses,) = ranks.run(1, resume, run_of(ONE, MUON), source)
    np.testing.assert_allclose(losses, uninterrupted[BEFORE:], rtol=0, atol=1e-5)
    expected, actual = (tensors_in(each) for each in (first_steps(ONE, ranks, tmp_path / "one"), source))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        ours, theirs = (without_biases_of_keys(name, each) for each in (actual[name], tensor))
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name
    moments = [name for name in expected if name.startswith("optimizer.exp_avg_sq.")]
    assert moments and not any(name.endswith(("linear_qkv.weight", "linear_fc2.weight")) for name in moments)


@pytest.mark.full
@pytest.mark.parametrize("case", BEFORE_LAYOUTS, ids=lambda case: case.name)
def test_loading_and_saving_changes_no_bit(case: Case, ranks: RankPool, tmp_path: Path) -> None:
    """Momentum and main weights in bfloat16, written by one process, read and written under another layout."""
    model = f"{MUON} --bf16"
    source = first_steps(ONE, ranks, tmp_path / "one", model)
    ranks.run(case.ranks, save_again, run_of(case, model, tmp_path / "again"), source)
    before, after = tensors_in(source), tensors_in(folder_of(tmp_path / "again", BEFORE))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def with_idle_ranks(function: Callable, *args: object) -> object:
    """Call ``function`` where the first rank of every group owns all parameters."""
    with patch.object(layer_wise, "_shares", lambda parameters, ranks: [parameters, *([[]] * (ranks - 1))]):
        return function(*args)


@pytest.mark.full
def test_ranks_that_own_nothing(ranks: RankPool, one_process: Callable, tmp_path: Path) -> None:
    """Ranks beyond the number of parameters receive all updates, and write no optimizer state."""
    case = Case("dp2-layer-wise", 2, LAYER_WISE)
    ranks.run(2, with_idle_ranks, train_and_save, run_of(case, MUON, tmp_path), BEFORE)
    for losses in ranks.run(2, with_idle_ranks, resume, run_of(case, MUON), folder_of(tmp_path, BEFORE)):
        np.testing.assert_allclose(losses, one_process(run_of(ONE, MUON)).losses[BEFORE:], rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("case", [ONE, LARGEST], ids=lambda case: case.name)
def test_same_layout_continues_to_the_bit(case: Case, ranks: RankPool, tmp_path: Path) -> None:
    run = run_of(case, f"{MUON} --bf16")
    uninterrupted = ranks.run(case.ranks, train, run)[0].losses
    checkpoint = first_steps(case, ranks, tmp_path, f"{MUON} --bf16")
    for losses in ranks.run(case.ranks, resume, run, checkpoint):
        assert losses == uninterrupted[BEFORE:]


def flops_of_update(run: RunConfig) -> tuple[int, int]:
    """Operations of a step's update that torch counts, and those of the plan."""
    trainer = build_trainer(run)
    trainer.step()
    with FlopCounterMode(display=False) as counter:
        trainer.optimizer.step_with_ready_grads()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return counter.get_total_flops(), dense_work(run, stage).flops + expert_work(run, stage).flops


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        Case("tp2-pp2", 4, f"{TP2} {PP2}", f"{LLAMA} --muon-no-split-qkv"),
        Case("ep2-experts", 2, EP2, f"{EXPERTS} --disable-bias-linear --moe-shared-expert-intermediate-size 48"),
        Case("unshared", 1, "", "--layout 2+2+2+2 --muon-num-ns-steps 3"),
    ],
    ids=lambda case: case.name,
)
def test_operations_are_as_planned(case: Case, ranks: RankPool) -> None:
    for counted, planned in ranks.run(case.ranks, flops_of_update, run_config(f"{case.model} {MUON}", case.layout)):
        assert counted == planned > 0


@pytest.mark.full
def test_from_adamw_to_muon_but_not_back(ranks: RankPool, tmp_path: Path) -> None:
    adam = first_steps(ONE, ranks, tmp_path / "adam", "")
    (losses,) = ranks.run(1, resume, run_of(ONE, MUON), adam)
    assert losses[-1] < losses[0]
    with pytest.raises(RuntimeError, match="--optimizer: the checkpoint has no exp_avg_sq of .*--no-load-optim"):
        ranks.run(1, resume, run_of(ONE), first_steps(ONE, ranks, tmp_path / "muon"))
