"""Faults that end a run and faults that do not: errors in a step, folders that differ, a closed terminal."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fleet import Fleet
from integration_runs import ROOT, SMALL

pytestmark = pytest.mark.full

FAILING = """
import sys
from mesh_megatron.platform import device
device.prepare()
import pretrain_mesh
from mesh_megatron.training import trainer
original, steps = trainer.train_step, []
def failing(*args, **kwargs):
    steps.append(None)
    if len(steps) == 3:
        raise {error}("no memory is left")
    return original(*args, **kwargs)
trainer.train_step = failing
sys.exit(pretrain_mesh.main())
"""


def run(program, *flags, stdout=subprocess.PIPE):
    return subprocess.run(
        [sys.executable, *program, *map(str, flags)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("error", ["RuntimeError", "ValueError"])
def test_an_error_in_a_step_ends_the_process_and_is_reported(error, corpus, tmp_path):
    """Data workers, which ignore signals and inherit open files, do not keep a failed process alive."""
    flags = [*SMALL, "--data-path", corpus, "--train-iters", 5, "--num-workers", 2, "--save", tmp_path]
    done = run(["-c", FAILING.format(error=error)], *flags)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and f"{error}: no memory is left" in done.stderr
    assert "is killed by signal" not in done.stderr


def test_an_error_on_one_rank_of_two_ends_both(corpus, tmp_path):
    flags = [*SMALL, "--data-path", corpus, "--train-iters", 5, "--micro-batch-size", 1, "--num-workers", 1]
    with Fleet(2, flags, tmp_path, FailsInStep(3, rank=1)) as fleet:
        assert fleet.exit_codes() == [1, 1]
        assert "RuntimeError: no memory is left" in fleet.output(1)


class FailsInStep:
    def __init__(self, step, rank):
        self.step, self.rank = step, rank

    def __call__(self, rank):
        from mesh_megatron.training import trainer

        original, steps = trainer.train_step, []

        def failing(*args, **kwargs):
            steps.append(None)
            if len(steps) == self.step and rank == self.rank:
                raise RuntimeError("no memory is left")
            return original(*args, **kwargs)

        trainer.train_step = failing


class WritesForEver:
    """No checkpoint is completed."""

    def __call__(self, rank):
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

        def write(*args, **kwargs):
            print(f"writing in process {os.getpid()}", flush=True)
            time.sleep(3600)

        FileSystemWriterAsync.write_preloaded_data = write


def test_what_writes_for_a_rank_that_is_killed_ends_with_it(corpus, tmp_path):
    flags = [*SMALL, "--data-path", corpus, "--train-iters", 1, "--async-save", "--save", tmp_path / "run"]
    with Fleet(1, flags, tmp_path, WritesForEver()) as fleet:
        fleet.wait_for("writing in process")
        writer = psutil.Process(int(re.search(r"writing in process (\d+)", fleet.output(0))[1]))
        assert writer.ppid() in fleet.pids
        fleet.kill()
        writer.wait(timeout=10)


def test_output_that_cannot_be_written_stops_nothing(corpus, tmp_path):
    """Write the output to a full disk, as for a job's log."""
    flags = [*SMALL, "--data-path", corpus, "--train-iters", 3, "--save", tmp_path]
    with Path("/dev/full").open("w") as full:
        done = run(["pretrain_mesh.py"], *flags, stdout=full)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "iter_0000003").is_dir()


class Elsewhere:
    """Give rank 1 another working directory."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, rank):
        if rank == 1:
            os.chdir(self.folder)


def test_another_save_folder_on_another_machine_is_refused(corpus, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    save = os.path.relpath(tmp_path / "runs", ROOT)
    flags = [*SMALL, "--data-path", corpus, "--train-iters", 3, "--micro-batch-size", 1, "--save", save]
    with Fleet(2, flags, tmp_path / "logs", Elsewhere(tmp_path / "elsewhere")) as fleet:
        assert fleet.exit_codes() == [2, 2]
        assert f"error: rank 1: --save {save} is another folder on " in fleet.output(0)
        assert "name one on a disk that all machines share" in fleet.output(1)
