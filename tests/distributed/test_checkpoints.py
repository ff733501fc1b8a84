"""A checkpoint of any layout continues under any other, optimizer state included.

All layouts write the same, so that one checkpoint stands for all where it is continued.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rank_preload  # noqa: F401  (before megatron.core)
import torch
from cases import (
    AROUND,
    CHECKPOINT_LAYOUTS,
    DRAWN,
    DROPOUT,
    KEYS,
    LOOP_SCHEMES,
    LORA,
    SANDWICH,
    SLOW_ROUTERS,
    Case,
    only_in_full,
    run_config,
)
from integration_runs import weights
from rank_pool import RankPool
from training_runs import checkpointer_of, parameter_names, resume, resumed_trainer, train_and_save

from mesh_megatron.checkpoint.folder import folder_of, latest_iteration
from mesh_megatron.checkpoint.safe_unpickling import SafeReader
from mesh_megatron.config.run import RunConfig
from mesh_megatron.platform import device

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

BEFORE, AFTER = 4, 10
HEADS = 4
ONE, TP2, *_, LARGEST = CHECKPOINT_LAYOUTS
BF16_LAYOUTS = [case for case in CHECKPOINT_LAYOUTS if case.name in ("one", "pp2", "dp2-distopt-overlap-buckets")]


def run_of(case: Case, model: str = "", save: Path | None = None) -> RunConfig:
    run = run_config(model, case.layout, BEFORE + AFTER)
    return dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save=save))


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case, str], Path]:
    """The checkpoint a layout wrote after ``BEFORE`` steps; written once."""
    known: dict[tuple[str, str], Path] = {}

    def checkpoint(case: Case, model: str = "") -> Path:
        if (case.name, model) not in known:
            save = tmp_path_factory.mktemp(case.name)
            ranks.run(case.ranks, train_and_save, run_of(case, model, save), BEFORE)
            assert latest_iteration(save) == BEFORE
            known[case.name, model] = folder_of(save, BEFORE)
        return known[case.name, model]

    return checkpoint


def tensors_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All of them by name, without the random states of ranks."""
    return {name: tensor for name, tensor in weights(checkpoint).items() if not name.startswith("rng.")}


def without_biases_of_keys(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Softmax cancels them: their gradients are rounding errors, and Adam makes steps of full length of those."""
    return tensor.view(HEADS, 3, -1)[:, ::2] if name.endswith("linear_qkv.bias") else tensor


@pytest.mark.parametrize("case", [LARGEST, *only_in_full(CHECKPOINT_LAYOUTS[1:-1])], ids=lambda case: case.name)
def test_contents_do_not_depend_on_the_layout(case: Case, saved: Callable) -> None:
    """Names, shapes, and every tensor within 1e-5 of its norm."""
    expected, actual = (tensors_in(saved(each)) for each in (ONE, case))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape and actual[name].dtype == tensor.dtype, name
        ours, theirs = (without_biases_of_keys(name, each) for each in (actual[name], tensor))
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name
    parameters = [name for name in expected if not name.startswith("optimizer.")]
    assert "core.layers.1.mlp.linear_fc2.weight" in parameters
    for name in parameters:
        moments = [expected[f"optimizer.{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")]
        assert [moment.shape for moment in moments] == [expected[name].shape] * 2


@pytest.mark.parametrize("target", [ONE, *only_in_full(CHECKPOINT_LAYOUTS[1:])], ids=lambda case: case.name)
def test_continues_as_if_never_interrupted(
    target: Case, ranks: RankPool, saved: Callable, one_process: Callable
) -> None:
    uninterrupted = one_process(run_of(ONE)).losses
    for losses in ranks.run(target.ranks, resume, run_of(target), saved(LARGEST)):
        np.testing.assert_allclose(losses, uninterrupted[BEFORE:], rtol=0, atol=1e-5)


@pytest.mark.full
def test_continues_with_the_same_dropout(ranks: RankPool, saved: Callable, one_process: Callable) -> None:
    """Bit for bit under the same layout, and to rounding under another."""
    uninterrupted = one_process(run_of(ONE, DROPOUT)).losses
    source = saved(ONE, DROPOUT)
    assert ranks.run(1, resume, run_of(ONE, DROPOUT), source)[0] == uninterrupted[BEFORE:]
    for losses in ranks.run(LARGEST.ranks, resume, run_of(LARGEST, DROPOUT), source):
        np.testing.assert_allclose(losses, uninterrupted[BEFORE:], rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("pair", [(LARGEST, TP2), (TP2, LARGEST)])
def test_continues_with_routers_at_a_rate_of_their_own(
    pair: tuple[Case, Case], ranks: RankPool, saved: Callable, one_process: Callable
) -> None:
    source, target = pair
    runs = [run_of(ONE, model) for model in (SLOW_ROUTERS, "")]
    uninterrupted, all_rates_alike = (np.array(one_process(run).losses[BEFORE:]) for run in runs)
    assert np.abs(uninterrupted - all_rates_alike).max() > 1e-4
    for losses in ranks.run(target.ranks, resume, run_of(target, SLOW_ROUTERS), saved(source, SLOW_ROUTERS)):
        np.testing.assert_allclose(losses, uninterrupted, rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("target", BF16_LAYOUTS, ids=lambda case: case.name)
def test_continues_in_bfloat16(target: Case, ranks: RankPool, saved: Callable, one_process: Callable) -> None:
    """Main weights travel in float32: without them ten steps would differ by far more than rounding."""
    uninterrupted = one_process(run_of(ONE, "--bf16")).losses
    for losses in ranks.run(target.ranks, resume, run_of(target, "--bf16"), saved(BF16_LAYOUTS[-1], "--bf16")):
        np.testing.assert_allclose(losses, uninterrupted[BEFORE:], rtol=0, atol=5e-3)


def test_loops_are_drawn_as_if_never_interrupted(ranks: RankPool, saved: Callable, one_process: Callable) -> None:
    uninterrupted = one_process(run_of(ONE, DRAWN)).losses
    [losses] = ranks.run(1, resume, run_of(ONE, DRAWN), saved(ONE, DRAWN))
    assert losses == uninterrupted[BEFORE:]


SMALL_RUN = "--hidden-size 16 --seq-length 16"
LOOP_MODELS = {name: LOOP_SCHEMES[name] for name in ("adapter", "hyper-dynamic", "attend")}
LOOP_MODELS |= {
    name: f"{flags} {SMALL_RUN}"
    for name, flags in {
        "decay": LOOP_SCHEMES["decay"],
        "hyper": LOOP_SCHEMES["hyper"],
        "around": f"{AROUND} --per-loop-norms {SANDWICH}",
        "lora": f"{LORA} --swiglu",
        "shared-keys": KEYS,
    }.items()
}


@pytest.mark.full
@pytest.mark.parametrize("name", LOOP_MODELS)
def test_other_looped_models_continue(name: str, ranks: RankPool, saved: Callable, one_process: Callable) -> None:
    """To the bit under the same layout, within 1e-5 under another."""
    model = LOOP_MODELS[name]
    uninterrupted = one_process(run_of(ONE, model)).losses[BEFORE:]
    checkpoint = saved(ONE, model)
    assert ranks.run(1, resume, run_of(ONE, model), checkpoint)[0] == uninterrupted
    for losses in ranks.run(LARGEST.ranks, resume, run_of(LARGEST, model), checkpoint):
        np.testing.assert_allclose(losses, uninterrupted, rtol=0, atol=1e-5)


@pytest.mark.full
def test_differences_of_loops_are_cut_for_ranks_and_joined(ranks: RankPool, saved: Callable, tmp_path: Path) -> None:
    """Over two tensor-parallel ranks of a ring: loaded and saved again, no bit of a tensor or a moment has changed."""
    source, model = saved(ONE, LOOP_MODELS["lora"]), LOOP_MODELS["lora"]
    ranks.run(LARGEST.ranks, save_again, run_of(LARGEST, model, tmp_path / "largest"), source)
    ranks.run(2, save_again, run_of(TP2, model, tmp_path / "tp2"), folder_of(tmp_path / "largest", BEFORE))
    before, after = tensors_in(source), tensors_in(folder_of(tmp_path / "tp2", BEFORE))
    assert after.keys() == before.keys() and "optimizer.exp_avg.core.layers.1.mlp.linear_fc1.loop_up" in before
    assert before["core.layers.1.mlp.linear_fc1.loop_up"].shape == (2, 2, 64, 3)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def save_again(run: RunConfig, checkpoint: Path) -> None:
    checkpointer = checkpointer_of(resumed_trainer(run, checkpoint))
    checkpointer.save()
    checkpointer.close()


@pytest.mark.full
@pytest.mark.parametrize("case", BF16_LAYOUTS, ids=lambda case: case.name)
def test_loading_and_saving_changes_no_bit(case: Case, ranks: RankPool, saved: Callable, tmp_path: Path) -> None:
    """In bfloat16, where layouts round too differently to compare what they have trained."""
    source = saved(ONE, "--bf16")
    ranks.run(case.ranks, save_again, run_of(case, "--bf16", tmp_path), source)
    before, after = tensors_in(source), tensors_in(folder_of(tmp_path, BEFORE))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


@pytest.mark.full
def test_same_layout_continues_in_bfloat16_to_the_bit(ranks: RankPool, saved: Callable, one_process: Callable) -> None:
    losses = ranks.run(1, resume, run_of(ONE, "--bf16"), saved(ONE, "--bf16"))[0]
    assert losses == one_process(run_of(ONE, "--bf16")).losses[BEFORE:]


FP8 = "--bf16 --fp8-format hybrid --fp8-recipe delayed"


def stored(checkpoint: Path) -> dict:
    """Key -> what the checkpoint's index says about it."""
    return SafeReader(checkpoint).index.state_dict_metadata


@pytest.mark.full
@pytest.mark.parametrize(("before", "after"), [("--bf16", FP8), (FP8, "--bf16"), (FP8, FP8)])
def test_scales_of_fp8_come_and_go(
    before: str, after: str, ranks: RankPool, saved: Callable, one_process: Callable
) -> None:
    """A run may begin or end with FP8. (Without Transformer Engine scales are empty and products in bfloat16.)"""
    checkpoint = saved(ONE, before)
    assert any("linear_qkv._extra_state" in key for key in stored(checkpoint)) == (before == FP8)
    losses = ranks.run(1, resume, run_of(ONE, after), checkpoint)[0]
    assert losses == one_process(run_of(ONE, "--bf16")).losses[BEFORE:]


@pytest.mark.full
def test_a_checkpoint_that_lacks_weights_is_not_loaded(ranks: RankPool, saved: Callable) -> None:
    with pytest.raises(RuntimeError, match="core.layers.2"):
        deeper = run_of(ONE, "--layout 2+3R2+2")
        ranks.run(1, resume, deeper, saved(ONE))


@pytest.mark.full
def test_routers_stay_float32_and_other_weights_have_float32_main_copies(saved: Callable) -> None:
    entries = {key: entry for key, entry in stored(saved(BF16_LAYOUTS[-1], "--bf16")).items() if hasattr(entry, "size")}
    dtypes = {name: str(entry.properties.dtype) for name, entry in entries.items() if not name.startswith("rng.")}
    for name in (name for name in dtypes if not name.startswith("optimizer.")):
        router = name.startswith("recurrence.")
        assert dtypes[name] == ("torch.float32" if router else "torch.bfloat16")
        assert (f"optimizer.main.{name}" in dtypes) is not router


@pytest.mark.full
def test_names_depend_on_loops_and_scheme_only_where_parameters_do(ranks: RankPool) -> None:
    def names(flags: str, layout: str = "", world: int = 1) -> set[str]:
        return set().union(*ranks.run(world, parameter_names, run_config(flags, layout)))

    base = names("--recurrence base")
    for scheme in ("residual", "anchor", "anchor_emb", "residual+anchor+anchor_emb"):
        assert names(f"--recurrence {scheme}") == base
    assert names("--recurrence base --layout 2+2R3+2") == base
    assert names("--recurrence base --layout 2+2R3+2", "--pipeline-model-parallel-size 2", 2) == base
    assert names("") - base == {
        f"recurrence.routers.{cycle}.{kind}" for cycle in range(3) for kind in ("weight", "bias")
    }
    assert names("--recurrence static") - base == {"recurrence.coefficients"}
    assert names("--recurrence dynamic") - base == {"recurrence.router.weight", "recurrence.router.bias"}


def resume_on_another_device(run: RunConfig, checkpoint: Path) -> list[float]:
    """A GPU's random state is 16 bytes, whatever the CPU's is."""
    device.rng_state = lambda: torch.zeros(16, dtype=torch.uint8)
    return resume(run, checkpoint)


@pytest.mark.full
def test_continues_on_another_kind_of_device(ranks: RankPool, saved: Callable, one_process: Callable) -> None:
    (losses,) = ranks.run(1, resume_on_another_device, run_of(ONE), saved(ONE))
    np.testing.assert_allclose(losses, one_process(run_of(ONE)).losses[BEFORE:], rtol=0, atol=1e-5)
