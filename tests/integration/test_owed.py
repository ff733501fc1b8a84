"""Evaluations and bad steps that a checkpoint leaves to the next run, which may have other settings."""

import json
import math

import pytest
from torch import Tensor

from mesh_megatron.training import step

pytestmark = pytest.mark.full

STOPPED_EARLY = 75


def records(save, kind):
    return [r for r in map(json.loads, (save / "metrics.jsonl").read_text().splitlines()) if kind in r]


@pytest.fixture
def owing(train, tmp_path):
    """Makes a run of four steps that was stopped after the step asked for with the evaluation due; gives its flags."""

    def start(iteration: int) -> list:
        flags = ["--train-iters", 4, "--eval-interval", 2, "--save", tmp_path]
        assert train(*flags, "--exit-interval", iteration)[0] == STOPPED_EARLY
        return flags

    return start


@pytest.mark.parametrize("iteration", [2, 4])
@pytest.mark.parametrize("eval_only", [False, True], ids=["training", "evaluating"])
def test_an_evaluation_is_not_due_where_there_is_none(owing, train, iteration, eval_only):
    flags = owing(iteration)
    assert train(*flags, "--eval-iters", 0, *(["--eval-only"] if eval_only else []))[0] == 0


def test_an_evaluation_that_is_due_comes_first_with_other_settings(owing, train, tmp_path):
    flags = owing(2)
    assert train(*flags, "--eval-interval", 100, "--split", "70,30,0")[0] == 0
    assert [record["iteration"] for record in records(tmp_path, "lm loss validation")] == [2, 4]


@pytest.mark.parametrize("iteration", [2, 4])
def test_a_limit_of_time_below_that_of_an_evaluation_lets_the_run_end(owing, train, tmp_path, iteration):
    """Even with no time left, a start makes the due evaluation and takes a step; its evaluation is postponed."""
    flags = owing(iteration)
    codes = [train(*flags, "--exit-duration-in-mins", 1e-9)[0] for _ in range(iteration, 4)]
    assert set(codes) <= {STOPPED_EARLY}
    assert train(*flags, "--exit-duration-in-mins", 1e-9)[0] == 0
    assert [record["iteration"] for record in records(tmp_path, "lm loss validation")] == [2, 4]


class Losses:
    """Loss functions in place of the trainer's: times a factor in chosen micro-batches of a run, two a step."""

    def __init__(self, monkeypatch) -> None:
        self._original, self._monkeypatch = step._loss, monkeypatch

    def times(self, factor: float, steps: range) -> None:
        calls = iter(range(1000))

        def loss(mask: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total, tokens, report = self._original(mask, total)
            by = factor if next(calls) // 2 in steps else 1.0
            return total * by, tokens, report * report.new_tensor([by, 1.0])

        self._monkeypatch.setattr(step, "_loss", loss)


@pytest.fixture
def distorted(monkeypatch):
    return Losses(monkeypatch)


def test_bad_steps_of_a_checkpoint_do_not_end_a_run_that_allows_fewer(train, tmp_path, distorted):
    """The run continues after two bad steps, and the first new step is skipped as their message advises."""
    flags = ["--train-iters", 6, "--eval-iters", 0, "--save", tmp_path]
    distorted.times(math.nan, range(1, 3))
    assert train(*flags, "--exit-interval", 3)[0] == STOPPED_EARLY
    distorted.times(1.0, range(0))
    assert train(*flags, "--max-bad-steps", 2, "--iterations-to-skip", 4)[0] == 0


def test_losses_of_before_spikes_were_off_measure_none(train, tmp_path, distorted):
    """Losses from before spikes were looked for are not compared with, or every step would be a spike."""
    flags = ["--train-iters", 12, "--eval-iters", 0, "--save", tmp_path]
    spikes = ["--loss-spike-factor", 1.5, "--loss-spike-window", 3, "--skip-loss-spikes", "--max-bad-steps", 4]
    assert train(*flags, *spikes, "--exit-interval", 4)[0] == STOPPED_EARLY
    distorted.times(3.0, range(100))
    assert train(*flags, "--exit-interval", 6)[0] == STOPPED_EARLY
    distorted.times(3.0, range(100))
    assert train(*flags, *spikes)[0] == 0
    assert not records(tmp_path, "event")
