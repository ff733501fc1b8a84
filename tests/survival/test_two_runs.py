"""Two starts with the same --save: the second is refused while the first runs, and continues it after it was killed."""

import time

import pytest
from fleet import Fleet
from integration_runs import SMALL, losses

from mesh_megatron.training.fault_tolerance import save_lock
from mesh_megatron.training.fault_tolerance.run_status import read_status
from mesh_megatron.training.fault_tolerance.save_lock import OWNER

pytestmark = pytest.mark.full

FLAGS = [*SMALL, "--save-interval", "5", "--async-save", "--keep-last", "2"]


def test_second_start_is_refused_until_the_first_is_killed(corpus, tmp_path):
    save = tmp_path / "run"
    flags = [*FLAGS, "--data-path", corpus, "--save", save]
    endless = [*flags, "--train-iters", "100000"]
    with Fleet(1, endless, tmp_path / "first") as first:
        first.wait_for_steps(1)
        with Fleet(1, endless, tmp_path / "second") as second:
            assert second.exit_codes() == [2]
            (pid,) = first.pids
            error = f"error: --save {save} is in use by another run, process {pid} on "
            assert error in second.output(0)
            assert "wait until it ends, end it, or give another folder" in second.output(0)
        steps = max(losses(save))
        first.wait_for_steps(steps + 20)  # these include checkpoints
        assert read_status(save).status == "running" and read_status(save).pid == pid
        first.kill()
    assert (save / OWNER).exists()
    start = time.monotonic()
    with Fleet(1, [*flags, "--exit-interval", "5", "--train-iters", "100000"], tmp_path / "third") as third:
        third.wait_for("continuing from ")
        assert time.monotonic() - start < save_lock._WATCH_SECONDS
        assert third.exit_codes() == [75], third.output(0)
    assert not (save / OWNER).exists()
    losses(save)  # raises on gaps and duplicates


def test_an_evaluation_of_a_run_that_goes_on(corpus, tmp_path):
    """--eval-only writes nothing and may read a checkpoint at any time."""
    save = tmp_path / "run"
    kept = ["--keep-last", "1000"]  # the checkpoint that is read must not be pruned
    flags = [*FLAGS[:-2], *kept, "--data-path", corpus, "--save", save, "--train-iters", "100000"]
    with Fleet(1, flags, tmp_path / "first") as first:
        first.wait_for("checkpoint, training waited")
        first.wait_for_steps(12)
        with Fleet(1, [*flags, "--eval-only"], tmp_path / "second") as second:
            assert second.exit_codes() == [0], second.output(0)
        assert first.running
