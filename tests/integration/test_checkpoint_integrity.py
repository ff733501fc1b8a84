"""Damaged checkpoints and full disks: a run continues from the newest intact checkpoint."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from integration_runs import ROOT, SMALL, losses, torchrun

import pretrain_mesh
from mesh_megatron.checkpoint.folder import TRACKER, folder_of, latest_iteration, saved_iterations
from mesh_megatron.checkpoint.manifest import MANIFEST, find_damage
from mesh_megatron.training.checkpointer import Checkpointer

pytestmark = pytest.mark.full

FLAGS = ["--train-iters", "8", "--save-interval", "3"]


@pytest.fixture(scope="module")
def interrupted(corpus, tmp_path_factory) -> Path:
    """A run that stopped at its second checkpoint."""
    save = tmp_path_factory.mktemp("interrupted")
    flags = [*SMALL, *FLAGS, "--data-path", corpus, "--exit-interval", "6", "--save", str(save)]
    assert pretrain_mesh.main(flags) == 75
    assert saved_iterations(save) == [3, 6] and latest_iteration(save) == 6
    return save


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> dict[int, tuple]:
    save = tmp_path_factory.mktemp("uninterrupted")
    assert pretrain_mesh.main([*SMALL, *FLAGS, "--data-path", corpus, "--save", str(save)]) == 0
    return losses(save)


def flip_a_bit(save: Path) -> None:
    file = max(folder_of(save, 6).glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def truncate(save: Path) -> None:
    file = next(folder_of(save, 6).glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)


DAMAGE = {
    "bit-flip": (flip_a_bit, "does not match its hash"),
    "truncation": (truncate, "bytes instead of"),
    "missing-file": (lambda save: (folder_of(save, 6) / ".metadata").unlink(), ".metadata is missing"),
    "missing-manifest": (lambda save: (folder_of(save, 6) / MANIFEST).unlink(), "manifest.json is missing"),
    "missing-folder": (lambda save: shutil.rmtree(folder_of(save, 6)), "there is no such folder"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_passed_over(train, interrupted, uninterrupted, tmp_path, kind):
    """The run prints a warning, continues from the older checkpoint, and ends bitwise as without the damage."""
    save = tmp_path / "run"
    shutil.copytree(interrupted, save)
    damage, reason = DAMAGE[kind]
    damage(save)
    code, out, err = train(*FLAGS, "--save", save, "--verify-checkpoint", "hash" if kind == "bit-flip" else "size")
    assert code == 0
    assert f"WARNING: {folder_of(save, 6)} is not intact: " in err and reason in err
    assert f"WARNING: starting from {folder_of(save, 3)} instead" in err
    assert f"continuing from {folder_of(save, 3)} at iteration 3" in out
    assert losses(save) == uninterrupted
    assert latest_iteration(save) == 8
    assert all(find_damage(folder_of(save, iteration), "hash") == [] for iteration in (3, 6, 8))


def test_missing_tracker_is_made_up_for(train, interrupted, uninterrupted, tmp_path):
    save = tmp_path / "run"
    shutil.copytree(interrupted, save)
    (save / TRACKER).unlink()
    code, out, err = train(*FLAGS, "--save", save)
    assert code == 0 and f"{TRACKER} is missing" in err and "at iteration 6" in out
    assert losses(save) == uninterrupted


def test_damaged_checkpoint_that_was_asked_for_is_refused(train, interrupted, tmp_path):
    save = tmp_path / "run"
    shutil.copytree(interrupted, save)
    truncate(save)
    code, _, err = train(*FLAGS, "--save", save, "--ckpt-step", 6)
    assert code == 2 and "--ckpt-step 6" in err and "is not intact" in err


def small_disk() -> None:
    """Limit the size of files, in place of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.mark.parametrize("flags", [[], ["--async-save"]], ids=["now", "later"])
def test_full_disk_leaves_training_running_and_the_last_checkpoint_whole(train, corpus, tmp_path, flags):
    train("--train-iters", 6, "--exit-interval", 2, "--save", tmp_path)
    command = [*SMALL, "--data-path", corpus, "--train-iters", "6", "--save-interval", "2", "--save", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "pretrain_mesh.py", *command, *flags],
        cwd=ROOT, preexec_fn=small_disk, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1 and "iteration        6/6" in result.stdout, result.stderr
    for iteration in (4, 6):
        warning = f"WARNING: checkpoint iter_000000{iteration} could not be written, older ones are as they were: rank"
        assert result.stderr.count(warning) == 1
    assert "writing on rank 0: " in result.stderr and "GB free now" in result.stderr
    assert "error: the last checkpoint iter_0000006 could not be written" in result.stderr
    assert [path.name for path in tmp_path.iterdir() if "iter_" in path.name] == ["iter_0000002"]
    assert latest_iteration(tmp_path) == 2 and find_damage(folder_of(tmp_path, 2), "hash") == []
    assert train("--train-iters", 6, "--save", tmp_path)[0] == 0  # with room again it goes on
    assert latest_iteration(tmp_path) == 6


@pytest.mark.parametrize("flags", [[], ["--async-save"]], ids=["now", "later"])
def test_tries_again_when_there_is_room(train, tmp_path, monkeypatch, flags):
    """The disk is full at the second of three checkpoints."""
    save, limits = Checkpointer.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_small_disk(self: Checkpointer) -> None:
        if self.state.iteration == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        try:
            save(self)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(Checkpointer, "save", save_on_a_small_disk)
    code, _, err = train("--train-iters", 6, "--save-interval", 2, "--save", tmp_path, *flags)
    assert code == 0 and err.count("could not be written") == 1 and "iter_0000004" in err
    assert saved_iterations(tmp_path) == [2, 6] and latest_iteration(tmp_path) == 6
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_two_ranks_pass_over_a_damaged_checkpoint_together(interrupted, corpus, tmp_path):
    save = tmp_path / "run"
    shutil.copytree(interrupted, save)
    flip_a_bit(save)
    flags = [*SMALL, *FLAGS, "--data-path", corpus, "--save", save, "--verify-checkpoint", "hash"]
    result = torchrun(2, "pretrain_mesh.py", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(f"WARNING: {folder_of(save, 6)} is not intact") == 1  # rank 0 says it for all
    assert f"continuing from {folder_of(save, 3)} at iteration 3" in result.stdout
    assert latest_iteration(save) == 8 and find_damage(folder_of(save, 8), "hash") == []
