"""tools/checkpoint.py as a user runs it, on a real run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from integration_runs import ROOT, SMALL

import pretrain_mesh
from mesh_megatron.checkpoint.folder import TRACKER, folder_of, latest_iteration, saved_iterations
from mesh_megatron.checkpoint.manifest import MANIFEST, find_damage
from mesh_megatron.training.fault_tolerance.save_lock import hold_save_lock

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    save = tmp_path_factory.mktemp("trained")
    flags = ["--data-path", corpus, "--train-iters", "6", "--save-interval", "1", "--save", str(save)]
    assert pretrain_mesh.main([*SMALL, *flags]) == 0
    return save


@pytest.fixture
def save(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def tool(monkeypatch, capsys):
    from mesh_megatron.commands import checkpoint

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["checkpoint.py", *map(str, args)])
        code = checkpoint.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_help_names_the_commands():
    help_text = subprocess.run(
        [sys.executable, "tools/checkpoint.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
    ).stdout  # fmt: skip
    for command in ("list", "verify", "prune", "rollback", "diff", "seal"):
        assert f" {command} " in help_text


def test_list(tool, save):
    os.truncate(folder_of(save, 2) / "__0_0.distcp", 10)
    (folder_of(save, 3) / MANIFEST).unlink()
    code, out, _ = tool("list", save)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 8
    assert [line[:11].split() for line in lines[1:7]] == [["1"], ["2"], ["3"], ["4"], ["5"], ["*", "6"]]
    assert lines[1].endswith("intact") and "1.280e+02" in lines[1]
    assert "damaged: __0_0.distcp has 10 bytes instead of" in lines[2]
    assert lines[3].endswith("damaged: manifest.json is missing")


def test_verify(tool, save):
    assert tool("verify", save)[0] == 0
    file = folder_of(save, 4) / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    code, out, _ = tool("verify", save)
    assert code == 1 and f"{folder_of(save, 4)}: __0_0.distcp does not match its hash" in out
    assert out.count(": intact") == 5
    assert tool("verify", folder_of(save, 4))[0] == 1 and tool("verify", folder_of(save, 5))[0] == 0


def test_prune_keeps_what_was_asked_for_and_the_trackers(tool, save):
    (save / TRACKER).write_text("2\n")
    os.truncate(folder_of(save, 6) / "__0_0.distcp", 10)  # damaged: does not count as one of the newest
    command = ("prune", save, "--keep-last", 1, "--keep-every", 4)
    code, out, _ = tool(*command, "--dry-run")
    assert code == 0 and [line[-1] for line in out.splitlines()] == ["1", "3", "6"] and "would delete" in out
    assert saved_iterations(save) == [1, 2, 3, 4, 5, 6]
    assert tool(*command)[0] == 0
    assert saved_iterations(save) == [2, 4, 5]
    code, _, err = tool("prune", save, "--keep-last", 0)
    assert code == 2 and "--keep-last 0 keeps none but the one to continue from" in err
    code, _, err = tool("prune", save)
    assert code == 2 and "--keep-last" in err and saved_iterations(save) == [2, 4, 5]


def test_rollback(tool, save, train):
    for missing in (9, 0, -1):
        code, _, err = tool("rollback", save, missing)
        assert code == 2 and err.count("\n") == 1
        assert f"{folder_of(save, missing)} is not intact: there is no such folder; iterations there: 1, 2, 3" in err
    code, out, _ = tool("rollback", save, 4)
    assert code == 0 and f"{folder_of(save, 4)} is the one to continue from" in out
    assert out.count("left as it is: ") == 2 and saved_iterations(save)[-1] == 6
    moved = folder_of(save, 6).rename(save / "moved")
    folder_of(save, 6).symlink_to(moved)  # as on a disk that was full
    code, out, _ = tool("rollback", save, 3, "--delete-newer")
    assert code == 0 and out.count("deleted ") == 3 and saved_iterations(save) == [1, 2, 3] and not find_damage(moved)
    folder_of(save, 6).symlink_to(moved)
    code, out, _ = train("--train-iters", 6, "--save", save)
    assert code == 0 and f"continuing from {folder_of(save, 3)} at iteration 3" in out
    assert not folder_of(save, 6).is_symlink() and not find_damage(folder_of(save, 6))


def test_rollback_to_what_was_imported(tool, save):
    folder_of(save, 1).rename(folder_of(save, 0))
    assert tool("rollback", save, 0)[0] == 0
    assert latest_iteration(save) == 0


def test_rollback_of_a_run_that_goes_on_is_refused(tool, save):
    with hold_save_lock(save):
        code, _, err = tool("rollback", save, 3)
    assert code == 2 and f"--save {save} is in use by another run" in err
    assert latest_iteration(save) == 6


def test_a_script_with_ckpt_step_that_is_started_again_goes_on(save, train):
    flags = ["--train-iters", 6, "--save", save, "--ckpt-step", 2]
    code, out, err = train(*flags, "--exit-interval", 4)
    assert code == 75 and f"continuing from {folder_of(save, 2)}" in out and "rollback" not in err
    code, out, err = train(*flags)
    assert code == 0 and f"continuing from {folder_of(save, 4)}" in out
    assert f"tools/checkpoint.py rollback {save} 2" in err


def test_diff(tool, trained, save, tmp_path, train):
    code, out, _ = tool("diff", folder_of(save, 3), folder_of(trained, 3))
    assert code == 0 and out.endswith("tensors are the same, 0 differ\n")
    code, out, _ = tool("diff", folder_of(trained, 3), trained)
    assert code == 1 and "setting resolved.iteration: 3 -> 6" in out
    assert "core.layers.0.mlp.linear_fc1.weight" in tool("diff", folder_of(trained, 3), trained, "--rows", 1000)[1]
    train("--train-iters", 1, "--recurrence", "base", "--save", tmp_path / "base")
    code, out, _ = tool("diff", trained, tmp_path / "base")
    assert code == 1 and "only in the first: recurrence.routers.0.weight" in out
    assert "setting model.recurrence: mesh -> base" in out


def test_seal_makes_a_checkpoint_without_manifest_loadable(tool, save, train):
    for iteration in saved_iterations(save):
        (folder_of(save, iteration) / MANIFEST).unlink()
    code, _, err = train("--train-iters", 6, "--save", save)
    assert code == 2 and "tools/checkpoint.py seal" in err and "iter_0000001" in err
    assert tool("seal", folder_of(save, 6))[0] == 0
    assert train("--train-iters", 6, "--save", save)[0] == 0


def test_mistakes_are_named(tool, tmp_path):
    for command in ("list", "verify"):
        code, _, err = tool(command, tmp_path)
        assert code == 2 and "no checkpoint found" in err
    code, _, err = tool("diff", tmp_path, tmp_path)
    assert code == 2 and "no checkpoint there" in err
    code, _, err = tool("seal", tmp_path)
    assert code == 2 and "run_config.json is missing" in err
