"""--timing-log-level times the parts of steps on every rank, without evaluations, and changes no step."""

from __future__ import annotations

import time

import pytest
from cases import DISTOPT, PP2, Case, only_in_full, run_config
from rank_pool import RankPool
from test_probe_interval import Losses
from training_runs import Records, build_trainer

from mesh_megatron.config.run import RunConfig
from mesh_megatron.training.callbacks.step_times import StepTimes

INTERVAL, STEPS = 2, 4
CASES = [Case("pp2", 2, PP2), *only_in_full([Case("distopt", 2, DISTOPT)])]
COARSE = {"forward-backward-time", "all-grads-sync-time", "optimizer-time", "optimizer-inner-step-time"}
FINE = {"batch-generator-time", "forward-compute-time", "backward-compute-time"}


class Points(Records):
    """Keeps what is plotted."""

    plot = Records.write


def timed_training(run: RunConfig, timed: bool) -> tuple[list[dict[str, float]], list[float], float]:
    """Plotted points, losses, and seconds in all."""
    trainer, points, losses = build_trainer(run), Points(), Losses()
    trainer.callbacks = [StepTimes(points, run.logging), losses] if timed else [losses]
    began = time.perf_counter()
    trainer.train()
    return [dict(point) for point in points.written], losses.losses, time.perf_counter() - began


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parts_of_steps(case: Case, ranks: RankPool) -> None:
    flags = f"--timing-log-level 2 --log-timers-to-tensorboard --log-interval {INTERVAL}"
    run = run_config(flags, case.layout, STEPS)
    for (points, losses, seconds), (_, expected, _) in zip(
        ranks.run(case.ranks, timed_training, run, True), ranks.run(case.ranks, timed_training, run, False), strict=True
    ):
        assert losses == expected
        assert [point["iteration"] for point in points] == [2, 4]
        for point in points:
            assert point.keys() >= COARSE | FINE
            assert any("recv" in name for name in point) == (case.name == "pp2")
            parts = point["forward-compute-time"] + point["backward-compute-time"]
            assert 0 < parts < point["forward-backward-time"]
            assert 0 < point["optimizer-inner-step-time"] < point["optimizer-time"]
        assert sum(INTERVAL * (point["forward-backward-time"] + point["optimizer-time"]) for point in points) < seconds
