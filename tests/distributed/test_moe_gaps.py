"""Gaps of Megatron-Core under a mixture of experts: without the patch of ``parallel/megatron_patches.py`` each test
sees a failure.

If a newer version has fixed a gap, its test is skipped with a message: then the function can be removed.
``test_moe.py`` shows that training is right with the patches.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import pytest
from cases import CP2, SP, TP2, run_config
from rank_pool import RankPool
from test_moe import EP2, ETP1, EXPERTS, SEQUENCES, Z_LOSS
from training_runs import TrainingRecord, train

from mesh_megatron.config.run import RunConfig

pytestmark = pytest.mark.full

ROUTER = "core.layers.0.mlp.router.weight"
BIASES = "core.layers.0.mlp.experts.experts.linear_fc2.bias"


def skip_if_fixed(fixed: bool) -> None:
    if fixed:
        pytest.skip(f"fixed in megatron-core {version('megatron-core')}: the function can be removed")


def train_without(patch: str, run: RunConfig) -> TrainingRecord:
    from mesh_megatron.parallel import megatron_patches

    setattr(megatron_patches, patch, lambda: None)
    return train(run, with_gradients=True)


def first_gradients_without(patch: str, ranks: int, model: str, layout: str) -> dict[str, np.ndarray]:
    """First gradients, from processes of their own, because a patch lasts as long as its process."""
    run = run_config(model, layout, steps=1)
    with RankPool() as fresh:
        return fresh.run(ranks, train_without, patch, run)[0].gradients


@pytest.mark.parametrize(
    ("patch", "ranks", "layout", "error"),
    [
        ("name_missing_gemm", 1, "", "te_general_gemm"),
        ("hand_out_splits_as_numbers", 2, EP2, "TypeError"),
        ("let_experts_add_biases", 1, "", "view and is being modified inplace"),
        ("reduce_experts_among_their_replicas", 2, f"{TP2} {SP} {ETP1}", "copies of core.layers.*experts"),
    ],
)
def test_fails_without_patch(patch: str, ranks: int, layout: str, error: str) -> None:
    failure = ""
    try:
        first_gradients_without(patch, ranks, EXPERTS, layout)
    except RuntimeError as raised:
        failure = str(raised)
    skip_if_fixed(not failure)
    assert re.search(error, failure), failure


@pytest.mark.parametrize(
    ("patch", "layout", "model", "parameter"),
    [
        ("keep_biases_of_experts_apart", f"{TP2} {SP} {EP2} {ETP1}", EXPERTS, BIASES),
        ("weigh_auxiliary_losses_as_asked", "", EXPERTS, ROUTER),
        ("weigh_auxiliary_losses_as_asked", CP2, EXPERTS, ROUTER),
        ("weigh_auxiliary_losses_as_asked", "", SEQUENCES, ROUTER),
        ("weigh_z_losses_as_asked", "", Z_LOSS, ROUTER),
    ],
)
def test_silently_wrong_without_patch(
    patch: str, layout: str, model: str, parameter: str, ranks: RankPool, one_process: Callable
) -> None:
    expected = one_process(run_config(model, steps=1)).gradients[parameter]
    actual = first_gradients_without(patch, 2 if layout else 1, model, layout)[parameter]
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    skip_if_fixed(error < 1e-5)
    assert error > 1e-2
