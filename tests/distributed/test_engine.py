"""Training with Transformer Engine's own Python on the CPU: what its C++ computes is computed by torch (``engine``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import (
    BUCKETS,
    CP2,
    CUT,
    DOCUMENTS,
    DRAWN,
    ENGINE_MODELS,
    FULL,
    GATE,
    GATE_ONLY,
    GOLDEN_MODELS,
    LLAMA,
    LOSS_WEIGHTS,
    OVERLAP,
    PP2,
    SELECTIVE,
    SP,
    TP2,
    Case,
    golden_file,
    run_config,
)
from collective_runs import collectives_of_a_layer
from engine.ranks import EngineRanks
from engine_runs import history_of_a_pass, losses_in_two_parts, train_with_engine, with_engine
from rank_pool import RankPool
from test_layouts import assert_same_training, largest_difference
from test_moe import EP2, EXPERTS
from training_runs import TrainingRecord, train

from mesh_megatron.planning.traffic import Collectives, layer_collectives

pytestmark = pytest.mark.full

COLLECTIVES = "allreduce_", "_allgather_base_", "_reduce_scatter_base_"
FP8_SIZES = "--bf16 --hidden-size 128 --seq-length 64 --micro-batch-size 4"
RECIPES = ["tensorwise", "delayed", "blockwise"]
CORE, CODA = "core.", "coda."  # what several loops add to, and several exits
NOISE = 0.25  # relative error of a gradient in FP8: 0.15 seen, 0.22 of gated layers; with one loop of two 0.32
CASES = [
    Case("gated", 1, "", LLAMA),
    Case("documents", 1, "", DOCUMENTS),
    Case("full-recompute", 1, FULL),
    Case("selective-recompute", 1, SELECTIVE),
    Case("no-rope-fusion", 1, "--no-rope-fusion"),
    Case("tp2", 2, TP2),
    Case("tp2-sp", 2, f"{TP2} {SP}"),
    Case("tp2-sp-gated", 2, f"{TP2} {SP}", LLAMA),
    Case("pp2", 2, PP2),
    Case("cp2", 2, CP2),
    Case("dp2-distopt-overlap-buckets", 2, f"{OVERLAP} {BUCKETS}"),
    Case("tp2-sp-exit-gate", 2, f"{TP2} {SP}", GATE, steps=3),
    Case("tp2-exit-gate-only", 2, TP2, GATE_ONLY, steps=3),
    Case("tp2-sp-pp2", 4, f"{TP2} {SP} {PP2}"),
    Case("experts", 1, "", EXPERTS),
    Case("experts-ep2-distopt-overlap", 2, f"{EP2} {OVERLAP}", EXPERTS),
]


@pytest.mark.parametrize("name", ENGINE_MODELS)
def test_losses_are_the_golden_ones(name: str, engine_ranks: EngineRanks) -> None:
    (record,) = engine_ranks.run(1, train_with_engine, run_config(GOLDEN_MODELS[name]))
    np.testing.assert_allclose(record.losses, np.loadtxt(golden_file(name))[:, 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_training_as_local_layers(case: Case, engine_ranks: EngineRanks, one_process: Callable) -> None:
    expected = one_process(run_config(case.model, steps=case.steps))
    for actual in engine_ranks.run(case.ranks, train_with_engine, run_config(case.model, case.layout, case.steps)):
        assert_same_training(actual, expected)


def test_gradients_tell_what_the_layers_as_they_are_would_do(engine_ranks: EngineRanks, one_process: Callable) -> None:
    """Only the last of a core's loops would count (``model/te_linear.py``)."""
    run = run_config(steps=1)
    (actual,) = engine_ranks.run(1, train_with_engine, run, "the first call overwrites")
    assert largest_difference(actual, one_process(run)) > 0.25


@pytest.mark.parametrize("model", ["", LLAMA, EXPERTS])
def test_bfloat16_trains_within_its_noise(model: str, engine_ranks: EngineRanks, one_process: Callable) -> None:
    """The attention is the fused one, which there is for 16-bit numbers only."""
    (actual,) = engine_ranks.run(1, train_with_engine, run_config(f"{model} --bf16"))
    np.testing.assert_allclose(actual.losses, one_process(run_config(model)).losses, rtol=0, atol=5e-3)


@pytest.fixture(scope="module")
def in_bfloat16(ranks: RankPool) -> Callable[[str], TrainingRecord]:
    known: dict[str, TrainingRecord] = {}

    def record(model: str) -> TrainingRecord:
        if model not in known:
            known[model] = ranks.run(1, train, run_config(f"{model} {FP8_SIZES}", steps=5), True)[0]
        return known[model]

    return record


@pytest.mark.parametrize("model", ["", LLAMA], ids=["mesh", "gated"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_trains_within_its_noise(recipe: str, model: str, engine_ranks: EngineRanks, in_bfloat16: Callable) -> None:
    run = run_config(f"{model} {FP8_SIZES} --fp8-format hybrid --fp8-recipe {recipe}", steps=5)
    (actual,) = engine_ranks.run(1, train_with_engine, run)
    assert_within_noise(actual, in_bfloat16(model), CORE)


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_train_in_fp8(recipe: str, engine_ranks: EngineRanks, in_bfloat16: Callable) -> None:
    """Noise sends some tokens to other experts, whose gradients then differ by more than noise."""
    run = run_config(f"--num-experts 4 {FP8_SIZES} --fp8-format hybrid --fp8-recipe {recipe}", steps=5)
    (actual,) = engine_ranks.run(1, train_with_engine, run)
    np.testing.assert_allclose(actual.losses, in_bfloat16("--num-experts 4").losses, rtol=0, atol=3e-2)


def in_fp8(*cases: tuple[str, Case], nightly: bool = False) -> list[Any]:
    """Parameters of a test: a recipe and a case."""
    marks = [pytest.mark.long] if nightly else []
    return [pytest.param(recipe, case, marks=marks, id=f"{recipe}-{case.name}") for recipe, case in cases]


RING = f"{PP2} --micro-batch-size 4"
WITH_EXITS = [
    *in_fp8(("delayed", Case("one", 1, "", GATE)), ("delayed", Case("tp2-sp", 2, f"{TP2} {SP}", GATE))),
    *in_fp8(("tensorwise", Case("pp2", 2, RING, GATE))),
    *in_fp8(*((recipe, Case("one", 1, "", GATE)) for recipe in ("tensorwise", "blockwise")), nightly=True),
    *in_fp8(("tensorwise", Case("loop-loss-weights", 1, "", LOSS_WEIGHTS)), nightly=True),
]


@pytest.mark.parametrize(("recipe", "case"), WITH_EXITS)
def test_exits_train_in_fp8(recipe: str, case: Case, engine_ranks: EngineRanks, in_bfloat16: Callable) -> None:
    """The coda runs on the states of all loops: together, or on a ring after each."""
    run = run_config(f"{case.model} {FP8_SIZES} --fp8-format hybrid --fp8-recipe {recipe}", case.layout, 5)
    expected = in_bfloat16(case.model)
    for actual in engine_ranks.run(case.ranks, train_with_engine, run):
        assert_within_noise(actual, expected, CORE, CODA)


DRAWN_OR_CUT = [Case("drawn", 1, "", DRAWN), Case("cut", 1, "", CUT)]
SOME_LOOPS = [
    *in_fp8(*(("delayed", case) for case in DRAWN_OR_CUT), ("tensorwise", Case("pp2-drawn", 2, RING, DRAWN))),
    *in_fp8(*((recipe, case) for recipe in ("tensorwise", "blockwise") for case in DRAWN_OR_CUT), nightly=True),
]


@pytest.mark.parametrize(("recipe", "case"), SOME_LOOPS)
def test_some_loops_train_in_fp8(recipe: str, case: Case, engine_ranks: EngineRanks, in_bfloat16: Callable) -> None:
    """Another number of loops in every step, and loops that run without gradients."""
    run = run_config(f"{case.model} {FP8_SIZES} --fp8-format hybrid --fp8-recipe {recipe}", case.layout, 5)
    expected = in_bfloat16(case.model)
    for actual in engine_ranks.run(case.ranks, train_with_engine, run):
        assert_within_noise(actual, expected, CORE)


def assert_within_noise(actual: TrainingRecord, expected: TrainingRecord, *parts: str) -> None:
    """Compare a run in FP8 with one in bfloat16: it differs, but not by more than rounding to eight bits."""
    for part in parts:
        assert 1e-2 < largest_difference(actual, expected, part) < NOISE
    np.testing.assert_allclose(actual.losses, expected.losses, rtol=0, atol=3e-2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_tell_in_fp8_too(recipe: str, engine_ranks: EngineRanks, in_bfloat16: Callable) -> None:
    run = run_config(f"{FP8_SIZES} --fp8-format hybrid --fp8-recipe {recipe}", steps=1)
    (actual,) = engine_ranks.run(1, train_with_engine, run, "the first call overwrites")
    assert largest_difference(actual, in_bfloat16(""), CORE) > 0.3


@pytest.mark.parametrize(
    ("recipe", "case"),
    [(recipe, Case("tp2-sp", 2, f"{TP2} {SP}")) for recipe in RECIPES]
    + [(recipe, Case("pp2", 2, f"{PP2} --micro-batch-size 4")) for recipe in ("tensorwise", "blockwise")],
    ids=lambda value: value.name if isinstance(value, Case) else value,
)
def test_fp8_in_any_layout(recipe: str, case: Case, engine_ranks: EngineRanks, in_bfloat16: Callable) -> None:
    model = f"{FP8_SIZES} --fp8-format hybrid --fp8-recipe {recipe}"
    for actual in engine_ranks.run(case.ranks, train_with_engine, run_config(model, case.layout, 5)):
        assert largest_difference(actual, in_bfloat16(""), CORE) < NOISE
        np.testing.assert_allclose(actual.losses, in_bfloat16("").losses, rtol=0, atol=3e-2)


RESUMED = {
    "float32": "",
    "bfloat16": "--bf16",
    "distopt": "--bf16 --use-distributed-optimizer",
    "experts": "--bf16 --num-experts 4",
    "drawn loops": f"{DRAWN} {FP8_SIZES} --fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 4",
    "tensorwise": f"{FP8_SIZES} --fp8-format hybrid --fp8-recipe tensorwise",
    "delayed": f"{FP8_SIZES} --fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 16 "
    "--fp8-amax-compute-algo max",
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_continues_the_same_run_to_the_bit(name: str, engine_ranks: EngineRanks, tmp_path: Path) -> None:
    """Scales and histories of delayed scaling are part of it, and the state of Transformer Engine's own optimizer."""
    ((complete, parts),) = engine_ranks.run(1, losses_in_two_parts, run_config(RESUMED[name], f"--save {tmp_path}"), 5)
    assert parts == complete


DELAYED = f"{FP8_SIZES} --global-batch-size 4 --fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 16"


@pytest.mark.parametrize(("loops", "model"), [(2, ""), (3, GATE), (4, CUT), (4, "--layout 0+2R4+0 --backprop-loops 2")])
def test_delayed_scaling_notes_the_largest_of_all_loops(loops: int, model: str, engine_ranks: EngineRanks) -> None:
    """Also where the first module of the pass, which ends the backward history's entry, runs without gradients."""
    (history,) = engine_ranks.run(1, history_of_a_pass, run_config(f"{model} {DELAYED}"))
    assert len(history.largest) == loops and history.largest[0] != history.largest[1]
    assert history.forward.tolist() == [max(history.largest)]
    assert len(history.backward) == 1


@pytest.mark.parametrize(
    ("fault", "forward", "backward"), [("a context for each block", 2, 2), ("a mark for each segment", 1, 2)]
)
def test_histories_tell(fault: str, forward: int, backward: int, engine_ranks: EngineRanks) -> None:
    (history,) = engine_ranks.run(1, history_of_a_pass, run_config(DELAYED), fault)
    assert (len(history.forward), len(history.backward)) == (forward, backward)


ONE_LAYER = [(TP2, Collectives(all_reduce=3)), (f"{TP2} {SP}", Collectives(all_gather=5, reduce_scatter=3))]


@pytest.mark.parametrize(("layout", "expected"), ONE_LAYER, ids=["tp2", "tp2-sp"])
def test_collectives_of_a_layer(layout: str, expected: Collectives, engine_ranks: EngineRanks) -> None:
    for counts in engine_ranks.run(2, collectives_of_a_layer, with_engine(run_config("", layout))):
        found = [sum(times for call, times in counts.items() if name in call) for name in COLLECTIVES]
        assert found == [expected.all_reduce, expected.all_gather, expected.reduce_scatter], counts


@pytest.mark.parametrize(("layout", "expected"), ONE_LAYER, ids=["tp2", "tp2-sp"])
def test_plans_count_as_many(layout: str, expected: Collectives) -> None:
    assert layer_collectives(with_engine(run_config("", layout))) == expected
