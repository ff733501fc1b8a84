"""A checkpoint of any layout continues under any other, optimizer state included."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rank_preload  # noqa: F401  (before megatron.core)
import torch
from cases import BUCKETS, CHECKPOINT_LAYOUTS, OVERLAP, PP2, SLOW_ROUTERS, Case, run_config
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from rank_pool import RankPool
from training_runs import parameter_names, resume, train_and_save

from mesh_megatron.checkpoint.folder import folder_of, latest_iteration
from mesh_megatron.config.run import RunConfig
from mesh_megatron.platform import device

BEFORE, AFTER = 4, 10
LARGEST = Case("pp2-dp2-distopt-overlap-buckets", 4, f"{PP2} {OVERLAP} {BUCKETS}")
BF16_LAYOUTS = [case for case in CHECKPOINT_LAYOUTS if case.name in ("one", "dp2-distopt-overlap-buckets", "pp2")]
PAIRS = [(a, b) for a in CHECKPOINT_LAYOUTS for b in CHECKPOINT_LAYOUTS]
PAIRS += [(LARGEST, CHECKPOINT_LAYOUTS[0]), (CHECKPOINT_LAYOUTS[0], LARGEST)]
BF16_PAIRS = [(a, b) for a in BF16_LAYOUTS for b in BF16_LAYOUTS]


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


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda case: case.name)
def test_continues_as_if_never_interrupted(
    source: Case, target: Case, ranks: RankPool, saved: Callable, one_process: Callable
) -> None:
    uninterrupted = one_process(run_of(CHECKPOINT_LAYOUTS[0])).losses
    for losses in ranks.run(target.ranks, resume, run_of(target), saved(source)):
        np.testing.assert_allclose(losses, uninterrupted[BEFORE:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pair", [(LARGEST, CHECKPOINT_LAYOUTS[1]), (CHECKPOINT_LAYOUTS[1], LARGEST)])
def test_continues_with_routers_at_a_rate_of_their_own(
    pair: tuple[Case, Case], ranks: RankPool, saved: Callable, one_process: Callable
) -> None:
    source, target = pair
    runs = [run_of(CHECKPOINT_LAYOUTS[0], model) for model in (SLOW_ROUTERS, "")]
    uninterrupted, all_rates_alike = (np.array(one_process(run).losses[BEFORE:]) for run in runs)
    assert np.abs(uninterrupted - all_rates_alike).max() > 1e-4
    for losses in ranks.run(target.ranks, resume, run_of(target, SLOW_ROUTERS), saved(source, SLOW_ROUTERS)):
        np.testing.assert_allclose(losses, uninterrupted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("source", "target"), BF16_PAIRS, ids=lambda case: case.name)
def test_continues_in_bfloat16(
    source: Case, target: Case, ranks: RankPool, saved: Callable, one_process: Callable
) -> None:
    """Main weights travel in float32: without them ten steps would differ by far more than rounding."""
    uninterrupted = one_process(run_of(CHECKPOINT_LAYOUTS[0], "--bf16")).losses
    for losses in ranks.run(target.ranks, resume, run_of(target, "--bf16"), saved(source, "--bf16")):
        np.testing.assert_allclose(losses, uninterrupted[BEFORE:], rtol=0, atol=5e-3)


def test_same_layout_continues_in_bfloat16_to_the_bit(ranks: RankPool, saved: Callable, one_process: Callable) -> None:
    one = CHECKPOINT_LAYOUTS[0]
    losses = ranks.run(1, resume, run_of(one, "--bf16"), saved(one, "--bf16"))[0]
    assert losses == one_process(run_of(one, "--bf16")).losses[BEFORE:]


FP8 = "--bf16 --fp8-format hybrid --fp8-recipe delayed"


@pytest.mark.parametrize(("before", "after"), [("--bf16", FP8), (FP8, "--bf16"), (FP8, FP8)])
def test_scales_of_fp8_come_and_go(
    before: str, after: str, ranks: RankPool, saved: Callable, one_process: Callable
) -> None:
    """A run may begin or end with FP8. (Without Transformer Engine scales are empty and products in bfloat16.)"""
    one = CHECKPOINT_LAYOUTS[0]
    checkpoint = saved(one, before)
    entries = load_sharded_metadata(str(checkpoint)).values()
    assert any("linear_qkv._extra_state" in entry.key for entry in entries) == (before == FP8)
    losses = ranks.run(1, resume, run_of(one, after), checkpoint)[0]
    assert losses == one_process(run_of(one, "--bf16")).losses[BEFORE:]


def test_a_checkpoint_that_lacks_weights_is_not_loaded(ranks: RankPool, saved: Callable) -> None:
    with pytest.raises(RuntimeError, match="core.layers.2"):
        deeper = run_of(CHECKPOINT_LAYOUTS[0], "--layout 2+3R2+2")
        ranks.run(1, resume, deeper, saved(CHECKPOINT_LAYOUTS[0]))


def tensors_in(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shape by name, without the random states of ranks."""
    metadata = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    return {name: entry.global_shape for name, entry in metadata.items() if not name.startswith("rng.")}


@pytest.mark.parametrize("case", [*CHECKPOINT_LAYOUTS[1:], LARGEST], ids=lambda case: case.name)
def test_names_and_shapes_do_not_depend_on_the_layout(case: Case, saved: Callable) -> None:
    expected = tensors_in(saved(CHECKPOINT_LAYOUTS[0]))
    assert tensors_in(saved(case)) == expected
    parameters = [name for name in expected if not name.startswith("optimizer.")]
    assert "core.layers.1.mlp.linear_fc2.weight" in parameters
    for name in parameters:
        assert expected[f"optimizer.exp_avg.{name}"] == expected[f"optimizer.exp_avg_sq.{name}"] == expected[name]


def test_routers_stay_float32_and_other_weights_have_float32_main_copies(saved: Callable) -> None:
    metadata = dist_checkpointing.load_tensors_metadata(str(saved(BF16_LAYOUTS[-1], "--bf16")))
    dtypes = {name: str(entry.dtype) for name, entry in metadata.items() if not name.startswith("rng.")}
    for name in (name for name in dtypes if not name.startswith("optimizer.")):
        router = name.startswith("recurrence.")
        assert dtypes[name] == ("torch.float32" if router else "torch.bfloat16")
        assert (f"optimizer.main.{name}" in dtypes) is not router


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


def test_continues_on_another_kind_of_device(ranks: RankPool, saved: Callable, one_process: Callable) -> None:
    one = CHECKPOINT_LAYOUTS[0]
    (losses,) = ranks.run(1, resume_on_another_device, run_of(one), saved(one))
    np.testing.assert_allclose(losses, one_process(run_of(one)).losses[BEFORE:], rtol=0, atol=1e-5)
