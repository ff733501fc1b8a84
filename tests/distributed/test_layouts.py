"""The law: however the ranks are laid out, training is the same.

Against one process with the same seed and the same global batches, over ten optimizer steps (three where the scheme is
what differs): loss within 1e-5, gradient norm within 1e-4 relative, every parameter's first gradient within 1e-5
relative, validation loss within 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cases import (
    BF16_CASES,
    CASES,
    MORE_BF16_CASES,
    MORE_CASES,
    RARE_BF16_CASES,
    RARE_CASES,
    Case,
    only_in_full,
    only_nightly,
    run_config,
)
from rank_pool import RankPool
from training_runs import TrainingRecord, train


@pytest.mark.parametrize(
    "case", [*CASES, *only_in_full(MORE_CASES), *only_nightly(RARE_CASES)], ids=lambda case: case.name
)
def test_same_training(case: Case, ranks: RankPool, one_process: Callable) -> None:
    run = run_config(case.model, case.layout, case.steps)
    run.validate(case.ranks)
    expected = one_process(run_config(case.model, steps=case.steps))
    for actual in ranks.run(case.ranks, train, run, True, True):
        assert_same_training(actual, expected)


def assert_same_training(actual: TrainingRecord, expected: TrainingRecord) -> None:
    np.testing.assert_allclose(actual.losses, expected.losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(actual.grad_norms, expected.grad_norms, rtol=1e-4)
    assert actual.evaluation == pytest.approx(expected.evaluation, abs=1e-5)
    assert largest_difference(actual, expected) < 1e-5


def largest_difference(actual: TrainingRecord, expected: TrainingRecord, part: str = "") -> float:
    """Return the largest relative difference of a parameter's first gradient, of those whose name begins like this."""
    assert actual.gradients.keys() == expected.gradients.keys()
    differences = {
        name: np.linalg.norm(actual.gradients[name] - gradient) / (np.linalg.norm(gradient) or 1.0)  # some must be 0
        for name, gradient in expected.gradients.items()
        if name.startswith(part)
    }
    worst = max(differences, key=differences.__getitem__)
    print(f"gradients differ most in {worst}: {differences[worst]:.2e}")  # shown where a test fails
    return float(differences[worst])


@pytest.mark.parametrize(
    "case",
    [*BF16_CASES, *only_in_full(MORE_BF16_CASES), *only_nightly(RARE_BF16_CASES)],
    ids=lambda case: case.name,
)
def test_same_training_within_the_noise_of_bfloat16(case: Case, ranks: RankPool, one_process: Callable) -> None:
    expected = one_process(run_config(case.model))
    for actual in ranks.run(case.ranks, train, run_config(case.model, case.layout), False, True):
        np.testing.assert_allclose(actual.losses, expected.losses, rtol=0, atol=5e-3)
        np.testing.assert_allclose(actual.grad_norms, expected.grad_norms, rtol=2e-2)
        assert actual.evaluation == pytest.approx(expected.evaluation, abs=5e-3)
