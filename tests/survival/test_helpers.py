"""Processes that a rank has started end with it."""

import time

import psutil
import pytest
from fleet import Fleet
from integration_runs import SMALL

pytestmark = pytest.mark.full


def test_nothing_outlives_a_killed_rank(corpus, tmp_path):
    """No data worker or checkpoint writer is left; each would hold its memory until the machine restarts."""
    flags = [*SMALL, "--train-iters", 100000, "--num-workers", 1, "--save-interval", 2, "--async-save"]
    with Fleet(1, [*flags, "--data-path", corpus, "--save", tmp_path], tmp_path / "logs") as fleet:
        fleet.wait_for("checkpoint, training waited")
        helpers = psutil.Process(fleet.pids[0]).children(recursive=True)
        assert helpers
        fleet.kill()
    deadline = time.monotonic() + 120
    while left := [helper for helper in helpers if helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
