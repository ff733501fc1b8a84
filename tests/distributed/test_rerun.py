"""A step whose loss is not finite is computed again: an error of the device goes away, bad data does not."""

from __future__ import annotations

import math

import pytest
from cases import PP2, SMALLER, run_config
from rank_pool import RankPool
from training_runs import build_trainer

from mesh_megatron.platform import device
from mesh_megatron.training import step

pytestmark = pytest.mark.full

STEPS, BAD = 4, 2


def losses_with(layout: str, times: int, injected: int = 0) -> tuple[list, dict, str]:
    """Losses, counters and log of four steps; the last rank's loss is NaN the first ``times`` times in the third."""
    import contextlib
    import io
    import logging

    flags = f"{layout} --rerun-mode validate_results" + (f" --error-injection-rate {injected}" if injected else "")
    trainer = build_trainer(run_config(flags))
    original, left = step._loss, times

    def faulty(mask, total):
        nonlocal left
        if trainer.state.iteration == BAD and left and device.rank() == device.world_size() - 1:
            left -= 1
            total = total * math.nan
        return original(mask, total)

    step._loss = faulty
    log = io.StringIO()
    logging.basicConfig(stream=log, force=True)
    with contextlib.redirect_stdout(log):
        results = [trainer.step() for _ in range(STEPS)]
    return [result.loss for result in results], trainer.state.to_dict(), log.getvalue()


LAYOUTS = {"dp2": SMALLER, "pp2": PP2}


@pytest.mark.parametrize("layout", [pytest.param("dp2", marks=pytest.mark.long), "pp2"])
def test_an_error_that_goes_away(ranks: RankPool, layout: str) -> None:
    flags = LAYOUTS[layout]
    clean = ranks.run(2, losses_with, flags, 0)
    faulty = ranks.run(2, losses_with, flags, 1)
    assert clean[0][0] == faulty[0][0], "training did not use the second result"
    assert faulty[0][1]["nan_steps"] == 0
    assert "Possible transient error" in faulty[1][2] and "Unexpected result" in faulty[1][2]
    assert "Unexpected result" not in clean[1][2]


def test_an_error_that_stays(ranks: RankPool) -> None:
    """Twice the same: a bad step, skipped like any other."""
    losses, state, log = ranks.run(2, losses_with, SMALLER, 1000)[1]
    assert math.isnan(losses[BAD]) and state["nan_steps"] == 1
    assert all(math.isfinite(loss) for number, loss in enumerate(losses) if number != BAD)
    assert "reproducible" in log


def test_pretended_errors(ranks: RankPool) -> None:
    pretended = ranks.run(1, losses_with, SMALLER, 0, 1)[0]
    assert "Injecting error type Transient error" in pretended[2]
    assert pretended[0] == ranks.run(1, losses_with, SMALLER, 0)[0][0]
