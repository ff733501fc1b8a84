"""Fully sharded data parallelism under the law of layouts, its checkpoints, and what each rank holds."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import (
    CP2,
    DRAWN,
    FULL,
    GATE,
    GATED,
    KEYS,
    LORA,
    PARTS,
    SANDWICH,
    SMALLER,
    Case,
    only_in_full,
    only_nightly,
    run_config,
)
from rank_pool import RankPool
from test_checkpoints import BEFORE, run_of, save_again, tensors_in, without_biases_of_keys
from training_runs import VOCABULARY, build_trainer, resume, train, train_and_save

from mesh_megatron.checkpoint.folder import folder_of
from mesh_megatron.checkpoint.optimizer_state import sub_optimizers
from mesh_megatron.config.run import RunConfig
from mesh_megatron.parallel.fully_sharded import held_part
from mesh_megatron.planning.fully_sharded import step_traffic
from mesh_megatron.planning.rank_memory import state_sizes
from mesh_megatron.planning.rank_parameters import rank_parameters
from mesh_megatron.training.callbacks.bad_steps import weights_are_finite

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHARDED = f"--use-torch-fsdp2 {SMALLER}"
DP2, ONE = Case("dp2", 2, SHARDED, steps=5), Case("one", 1)
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
UNEVEN = "--use-torch-fsdp2 --micro-batch-size 1 --global-batch-size 6"
HSDP = Case("dp4-two-copies", 4, f"{SHARDED} --num-distributed-optimizer-instances 2", steps=5)
CASES = [DP2, Case("dp2-full-recompute", 2, f"{SHARDED} {FULL}", "--layout 1+2R3+1", steps=5)]
MORE_CASES = [
    HSDP,
    Case("dp4-two-copies-full-recompute-drawn-loops", 4, f"{HSDP.layout} {FULL}", DRAWN, steps=5),
    Case("dp2-recomputed-parts-drawn-loops", 2, f"{SHARDED} {PARTS}", f"{DRAWN} {DROPOUT}", steps=5),
    Case("dp2-block-recompute", 2, f"{SHARDED} {FULL} --recompute-method block", DROPOUT, steps=5),
    Case("dp4-gated-tied", 4, SHARDED, f"{GATED} --no-untie-embeddings-and-output-weights", steps=5),
    Case("dp3-uneven", 3, UNEVEN, "--recurrence dynamic", steps=5),
    Case(
        "dp2-dropout", 2, SHARDED, "--hidden-dropout 0.1 --attention-dropout 0.1 --loop-norm --loop-embedding", steps=5
    ),
    Case("cp2", 2, f"{CP2} --use-torch-fsdp2", steps=5),
    Case("dp2-exit-gate-full-recompute", 2, f"{SHARDED} {FULL}", GATE, steps=5),
    Case("dp2-shared-keys-drawn-loops", 2, SHARDED, f"{KEYS} {DRAWN}", steps=5),
    Case("dp2-shared-keys-full-recompute", 2, f"{SHARDED} {FULL}", KEYS, steps=5),
]
RARE_CASES = [
    Case("dp2-norms-of-loops-full-recompute", 2, f"{SHARDED} {FULL}", f"{DRAWN} --per-loop-norms", steps=5),
    Case("dp2-low-rank-full-recompute", 2, f"{SHARDED} {FULL}", "--loop-lora-rank 2", steps=5),
    Case("dp2-unshared", 2, SHARDED, "--layout 2+2+2+2 --recurrence anchor_emb", steps=5),
    Case("dp2-three-loops", 2, f"{SHARDED} --micro-batch-size 1", "--layout 1+2R3+1", steps=5),
    Case("dp2-selective-recompute", 2, f"{SHARDED} --recompute-granularity selective", steps=5),
    Case("dp2-loop-loss-weights", 2, SHARDED, "--layout 2+2R3+2 --loop-loss-weights 1 2 3", steps=5),
    Case("dp2-weights-of-loops", 2, SHARDED, f"{LORA} {SANDWICH} --per-loop-norms --layout 2+2R3+2", steps=5),
]


ALL_CASES = [*CASES, *only_in_full(MORE_CASES), *only_nightly(RARE_CASES)]


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_same_training(case: Case, ranks: RankPool, one_process: Callable) -> None:
    """Losses, norms before clipping and validation loss of one process with the same batches."""
    run = run_config(case.model, case.layout, case.steps)
    run.validate(case.ranks)
    batch = f"--global-batch-size {run.training.global_batch_size}"
    expected = one_process(run_config(f"{case.model} {batch} --micro-batch-size 1".strip(), steps=case.steps))
    for actual in ranks.run(case.ranks, train, run, False, True):
        np.testing.assert_allclose(actual.losses, expected.losses, rtol=0, atol=1e-5)
        np.testing.assert_allclose(actual.grad_norms, expected.grad_norms, rtol=1e-4)
        assert actual.evaluation == pytest.approx(expected.evaluation, abs=1e-5)


def first_steps(case: Case, ranks: RankPool, save: Path, model: str = "") -> Path:
    """A checkpoint that this layout wrote after ``BEFORE`` steps."""
    ranks.run(case.ranks, train_and_save, run_of(case, model, save), BEFORE)
    return folder_of(save, BEFORE)


@pytest.mark.full
@pytest.mark.parametrize("case", [DP2, HSDP], ids=lambda case: case.name)
def test_checkpoints_are_those_of_one_process(
    case: Case, ranks: RankPool, one_process: Callable, tmp_path: Path
) -> None:
    """Same names and tensors, and each continues under the other's layout."""
    sharded, one = (first_steps(each, ranks, tmp_path / each.name) for each in (case, ONE))
    expected, actual = tensors_in(one), tensors_in(sharded)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        ours, theirs = (without_biases_of_keys(name, each) for each in (actual[name], tensor))
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name
    uninterrupted = one_process(run_of(ONE)).losses[BEFORE:]
    (losses,) = ranks.run(1, resume, run_of(ONE), sharded)
    np.testing.assert_allclose(losses, uninterrupted, rtol=0, atol=1e-5)
    for losses in ranks.run(case.ranks, resume, run_of(case), one):
        np.testing.assert_allclose(losses, uninterrupted, rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("case", [DP2, Case("dp3", 3, UNEVEN), HSDP])
def test_loading_and_saving_changes_no_bit(case: Case, ranks: RankPool, tmp_path: Path) -> None:
    """In bfloat16: weights, float32 main weights and moments."""
    source = first_steps(ONE, ranks, tmp_path / "one", "--bf16")
    ranks.run(case.ranks, save_again, run_of(case, "--bf16", tmp_path / "again"), source)
    before, after = tensors_in(source), tensors_in(folder_of(tmp_path / "again", BEFORE))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


def finite_before_and_after(run: RunConfig) -> tuple[bool, bool]:
    """Return whether all weights are finite, after a step and with an infinity in the last rank's share."""
    trainer = build_trainer(run)
    trainer.step()
    before = weights_are_finite(trainer.model)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        held_part(trainer.model.modules[0].output_layer.weight).data[-1, -1] = torch.inf
    return before, weights_are_finite(trainer.model)


@pytest.mark.full
@pytest.mark.parametrize("model", ["", "--recurrence base"])
def test_a_wrong_number_in_one_share_is_found(model: str, ranks: RankPool) -> None:
    """Shares and complete parameters, those of the recurrence, are checked."""
    assert ranks.run(2, finite_before_and_after, run_config(model, SHARDED)) == [(True, False)] * 2


@pytest.mark.full
@pytest.mark.parametrize("case", [DP2, *only_nightly([HSDP])], ids=lambda case: case.name)
def test_bfloat16_continues_to_the_bit(case: Case, ranks: RankPool, one_process: Callable, tmp_path: Path) -> None:
    run = run_of(case, "--bf16")
    uninterrupted = ranks.run(case.ranks, train, run)[0].losses
    for losses in ranks.run(case.ranks, resume, run, first_steps(case, ranks, tmp_path, "--bf16")):
        assert losses == uninterrupted[BEFORE:]
    np.testing.assert_allclose(uninterrupted, one_process(run_of(ONE)).losses, rtol=0, atol=5e-3)


def live_bytes() -> dict[int, int]:
    """Address -> size of the storage of every tensor that Python can see (a DTensor has that of its local part)."""
    kinds = torch.Tensor, torch.nn.Parameter
    found = [each for each in gc.get_objects() if type(each) in kinds and each.device.type != "meta"]
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}


def held_bytes(run: RunConfig) -> tuple[int, dict[str, int]]:
    """Bytes of all tensors of this rank between two steps, and those of parameters, gradients and moments."""
    trainer = build_trainer(run)
    before = sum(live_bytes().values())  # parameters, and what is not the model's
    trainer.step()
    parameters = [held_part(parameter) for parameter in trainer.model.modules[0].parameters()]
    held = {
        "weights": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(parameter.main_grad.nbytes for parameter in parameters),
        "optimizer": sum(
            state[kind].nbytes
            for part in sub_optimizers(trainer.optimizer)
            for state in part.optimizer.state.values()
            for kind in ("exp_avg", "exp_avg_sq")
        ),
    }
    gc.collect()
    return sum(live_bytes().values()) - before, held


@pytest.mark.full
def test_each_rank_holds_its_share(ranks: RankPool) -> None:
    """As planned; and nothing of a step remains: neither gathered weights nor gradients that were not divided."""
    plain = run_config("--bf16")
    complete = state_sizes(plain, rank_parameters(plain.model, plain.parallel, VOCABULARY, 0), 1)
    whole = complete.weights + complete.gradients + complete.optimizer
    for count, layout in ((2, SHARDED), (4, SHARDED), (4, HSDP.layout)):
        run = run_config("--bf16", layout)
        planned = state_sizes(run, rank_parameters(run.model, run.parallel, VOCABULARY, 0), count)
        seen = ranks.run(count, held_bytes, run)
        for kind in ("weights", "gradients", "optimizer"):
            # Shares differ by where rows end; the plan has the mean, rounded up.
            mean = sum(held[kind] for _, held in seen) / count
            assert mean == pytest.approx(getattr(planned, kind), abs=8)
        for added, held in seen:
            assert added <= 1.02 * (held["gradients"] + held["optimizer"])
            assert sum(held.values()) < whole / run.parallel.share_ranks(count)


@pytest.mark.parametrize(
    "layout",
    [
        "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--num-experts 2", "--fp16",
        "--optimizer muon", "--use-distributed-optimizer", "--overlap-grad-reduce", "--recompute-num-layers 2",
        "--bf16 --grad-reduce-in-bf16", "--bf16 --fp8-format hybrid",
        "--check-weight-hash-across-dp-replicas-interval 5", "--backprop-loops 1",
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(layout: str) -> None:
    recompute = FULL if "recompute" in layout else ""
    run = run_config(layout, f"{SHARDED} --micro-batch-size 1 {recompute}")
    with pytest.raises(ValueError, match=f"--use-torch-fsdp2 does not work with {layout.removeprefix('--bf16 ')}"):
        run.validate(2)


def test_copies_must_divide_the_ranks_and_need_shares() -> None:
    copies = "--num-distributed-optimizer-instances 3"
    with pytest.raises(ValueError, match=f"{copies} does not divide 4 ranks"):
        run_config(copies, SHARDED).validate(4)
    with pytest.raises(ValueError, match=f"{copies} needs --use-torch-fsdp2"):
        run_config(copies, SMALLER).validate(2)


def collectives_of_a_step(run: RunConfig) -> dict[str, int]:
    """Name of a collective -> how often a warm step calls it."""
    trainer = build_trainer(run)
    trainer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.step()
    return Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))


@pytest.mark.full
@pytest.mark.parametrize(
    "model, layout", [("--layout 1+2R3+1", ""), ("--layout 1+2+2+1", ""), ("--layout 1+2R3+1", FULL)]
)
def test_gathers_and_reductions_are_as_planned(ranks: RankPool, model: str, layout: str) -> None:
    """A shared core is gathered for every loop and its gradients are reduced once per step, of two micro-batches."""
    run = run_config(model, f"{SHARDED} {layout}".strip())
    planned = step_traffic(run, VOCABULARY, micro_batches=2)
    for seen in ranks.run(2, collectives_of_a_step, run):
        assert seen["c10d::_allgather_base_"] == planned.gathers
        assert seen["c10d::_reduce_scatter_base_"] == planned.reductions


@pytest.mark.full
def test_copies_sum_each_reduced_share_once(ranks: RankPool) -> None:
    flags = f"{SHARDED} --micro-batch-size 1"
    one, two = (run_config("", f"{flags} --num-distributed-optimizer-instances {copies}") for copies in (1, 2))
    planned = step_traffic(two, VOCABULARY, micro_batches=2)
    for alone, copied in zip(
        ranks.run(4, collectives_of_a_step, one), ranks.run(4, collectives_of_a_step, two), strict=True
    ):
        assert copied["c10d::_allgather_base_"] == planned.gathers
        assert copied["c10d::_reduce_scatter_base_"] == planned.reductions
        assert copied["c10d::allreduce_"] - alone["c10d::allreduce_"] == planned.reductions
