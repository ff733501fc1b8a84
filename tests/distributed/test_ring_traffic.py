"""State passing costs the ring nothing between ranks, and the ring holds nothing twice (docs/parallelism.md)."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from cases import PP2, run_config
from collective_runs import ranges_of_a_step
from rank_pool import ROOT, RankPool

sys.path.insert(0, str(ROOT / "benchmarks"))

from ring_traffic import MICRO_BATCHES, MODELS, RingTimes, layers_held, measure, replay  # noqa: E402

pytestmark = pytest.mark.full

CHUNKS = 4


@pytest.fixture(scope="module")
def measured(ranks: RankPool) -> dict[tuple[str, int], list[dict[str, Any]]]:
    wanted = [("base", 1), ("mesh", 1), *((model, 2) for model in MODELS)]
    return {(model, size): ranks.run(size, measure, model, size) for model, size in wanted}


@pytest.mark.parametrize("model", MODELS)
def test_one_tensor_a_hop_whatever_the_scheme(model: str, measured: dict) -> None:
    of_ranks = measured[model, 2]
    state = of_ranks[0]["state_bytes"]
    assert all(set(rank["hops"]) == {state} for rank in of_ranks)
    hops = sum(rank["hops"][state] for rank in of_ranks)
    assert hops == 2 * MICRO_BATCHES * (2 * CHUNKS - 1)  # forward and backward, between all stages of the way


def test_nothing_is_held_twice(measured: dict) -> None:
    (whole,), halves = measured["mesh", 1], measured["mesh", 2]
    for kind in ("parameters", "gradients", "optimizer"):
        assert [rank["bytes"][f"blocks {kind}"] * 2 for rank in halves] == [whole["bytes"][f"blocks {kind}"]] * 2
        assert sum(rank["bytes"][f"rest {kind}"] for rank in halves) == whole["bytes"][f"rest {kind}"]
    allocated = sum(rank["bytes"]["buffers"] for rank in halves)
    assert allocated < 1.01 * whole["bytes"]["buffers"]  # but for padding


def test_recorded_order_can_run_and_does_all_the_work(measured: dict) -> None:
    tasks = replay([rank["work"] for rank in measured["mesh", 2]], RingTimes.of_layers(layers_held(2)))
    passes = {(task.rank, task.kind, task.chunk, task.micro_batch) for task in tasks}
    assert len(passes) == len(tasks) == 2 * 2 * CHUNKS * MICRO_BATCHES


def test_a_profile_of_a_ring_names_the_loops(ranks: RankPool) -> None:
    run = run_config("", PP2)
    times = run.training.global_batch_size // run.training.micro_batch_size
    layers = {name: times for name in ("prelude", "core, loop 0", "core, loop 1", "coda")}
    assert ranks.run(2, ranges_of_a_step, run) == [layers, layers | {"head": times}]
