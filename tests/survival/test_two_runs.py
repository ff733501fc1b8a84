"""Two starts with one --save: the second leaves the first alone, and takes its place as soon as it is dead."""

import time

import pytest
from fleet import Fleet
from integration_runs import SMALL, losses

from mesh_megatron.training import ownership
from mesh_megatron.training.ownership import OWNER
from mesh_megatron.training.run_status import read_status

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
            assert error in second.output(0) and "wait for its end, end it, or name another folder" in second.output(0)
        steps = max(losses(save))
        first.wait_for_steps(steps + 20)  # which need checkpoints to be written
        assert read_status(save).status == "running" and read_status(save).pid == pid
        first.kill()
    assert (save / OWNER).exists()
    start = time.monotonic()
    with Fleet(1, [*flags, "--exit-interval", "5", "--train-iters", "100000"], tmp_path / "third") as third:
        third.wait_for("continuing from ")
        assert time.monotonic() - start < ownership._WATCH_SECONDS
        assert third.exit_codes() == [75], third.output(0)
    assert not (save / OWNER).exists()
    losses(save)  # without gaps or doubles


def test_an_evaluation_of_a_run_that_goes_on(corpus, tmp_path):
    """--eval-only writes nothing, and may look at a checkpoint at any time."""
    save = tmp_path / "run"
    kept = ["--keep-last", "1000"]  # what is being read must not be pruned meanwhile
    flags = [*FLAGS[:-2], *kept, "--data-path", corpus, "--save", save, "--train-iters", "100000"]
    with Fleet(1, flags, tmp_path / "first") as first:
        first.wait_for("checkpoint, training waited")
        first.wait_for_steps(12)
        with Fleet(1, [*flags, "--eval-only"], tmp_path / "second") as second:
            assert second.exit_codes() == [0], second.output(0)
        assert first.running
