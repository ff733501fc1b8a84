"""Which checkpoint a run starts from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mesh_megatron.checkpoint.folder import (
    CONFIG,
    TRACKER,
    find_checkpoint,
    folder_of,
    latest_iteration,
    prune,
    rollback,
    saved_iterations,
)
from mesh_megatron.checkpoint.manifest import MANIFEST, seal
from mesh_megatron.config.checkpoint import CheckpointConfig
from mesh_megatron.config.run import RunConfig


def write(save: Path, *iterations: int, tracked: int | None = None) -> Path:
    for iteration in iterations:
        folder = folder_of(save, iteration)
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(bytes(100))
        seal(folder)
    if tracked is not None:
        (save / TRACKER).write_text(f"{tracked}\n")
    return save


def damage(save: Path, *iterations: int) -> None:
    for iteration in iterations:
        (folder_of(save, iteration) / "__0_0.distcp").write_bytes(b"")


def run_with(**settings) -> RunConfig:
    return RunConfig(checkpoint=CheckpointConfig(**settings))


def chosen(**settings) -> tuple[str | None, tuple[str, ...]]:
    choice = find_checkpoint(run_with(**settings))
    return (choice.folder.name if choice.folder else None), choice.warnings


def test_the_trackers_checkpoint_without_a_word(tmp_path):
    write(tmp_path, 10, 20, 30, tracked=20)
    assert chosen(save=tmp_path) == ("iter_0000020", ())


def test_nothing_to_start_from(tmp_path):
    assert chosen() == (None, ())
    assert chosen(save=tmp_path) == chosen(save=tmp_path / "new") == (None, ())


def test_falls_back_to_the_newest_older_one_and_says_so(tmp_path):
    write(tmp_path, 10, 20, 30, 40, tracked=30)
    damage(tmp_path, 30)
    name, warnings = chosen(save=tmp_path)
    assert name == "iter_0000020"
    assert warnings == (
        f"{tmp_path}/iter_0000030 is not intact: __0_0.distcp has 0 bytes instead of 100",
        f"starting from {tmp_path}/iter_0000020 instead",
    )


def test_falls_back_past_several_and_to_newer_ones_last(tmp_path):
    write(tmp_path, 10, 20, 30, 40, 50, tracked=30)
    damage(tmp_path, 20, 30)
    assert chosen(save=tmp_path)[0] == "iter_0000010"
    damage(tmp_path, 10)
    name, warnings = chosen(save=tmp_path)
    assert name == "iter_0000050" and len(warnings) == 4


@pytest.mark.parametrize(("content", "complaint"), [(None, "is missing"), (b"x", "holds 'x'"), (b"\xff", "cannot be")])
def test_a_tracker_that_says_nothing(tmp_path, content, complaint):
    write(tmp_path, 10, 20)
    if content is not None:
        (tmp_path / TRACKER).write_bytes(content)
    name, warnings = chosen(save=tmp_path)
    assert name == "iter_0000020" and complaint in warnings[0] and "instead" in warnings[1]


def test_a_tracker_that_names_what_is_not_there(tmp_path):
    write(tmp_path, 10, tracked=20)
    name, warnings = chosen(load=tmp_path)
    assert name == "iter_0000010" and "iter_0000020 is not intact: there is no such folder" in warnings[0]


def test_none_is_intact(tmp_path):
    write(tmp_path, 10, 20, tracked=20)
    damage(tmp_path, 10)
    (folder_of(tmp_path, 20) / MANIFEST).unlink()
    both = r"iter_0000020 is not intact: manifest.json is missing; .*iter_0000010 is not intact"
    with pytest.raises(ValueError, match=both):
        chosen(save=tmp_path)
    good = write(tmp_path / "other", 5, tracked=5)
    with pytest.raises(ValueError, match="no checkpoint to start from"):  # its progress is not given up silently
        chosen(save=tmp_path, load=good)


def test_the_one_that_was_asked_for_or_none(tmp_path):
    write(tmp_path, 10, 20, tracked=20)
    assert chosen(save=tmp_path, ckpt_step=10) == ("iter_0000010", ())
    damage(tmp_path, 10)
    with pytest.raises(ValueError, match="--ckpt-step 10: .*iter_0000010 is not intact: __0_0.distcp has 0 bytes"):
        chosen(save=tmp_path, ckpt_step=10)
    with pytest.raises(ValueError, match="iterations there: 10, 20"):
        chosen(load=tmp_path, ckpt_step=7)


def test_a_load_folder_without_a_checkpoint_means_random_weights(tmp_path):
    """Scripts of Megatron-LM name one folder as --save and --load, also at their first start."""
    for load in (tmp_path, tmp_path / "nowhere"):
        name, warnings = chosen(save=tmp_path, load=load)
        assert name is None and warnings == (f"--load {load}: no {TRACKER} there; training starts from random weights",)
        with pytest.raises(ValueError, match=f"--exit-on-missing-checkpoint: --load {load}: no {TRACKER} there"):
            chosen(save=tmp_path, load=load, exit_on_missing_checkpoint=True)
    write(tmp_path, 10, tracked=10)
    assert chosen(save=tmp_path, load=tmp_path, exit_on_missing_checkpoint=True) == ("iter_0000010", ())


def test_a_branch_begins_at_a_step_of_another_run_and_then_has_its_own(tmp_path):
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    write(trunk, 10, 20, tracked=20)
    asked = {"load": trunk, "ckpt_step": 10}
    assert find_checkpoint(run_with(save=branch, **asked)).folder == folder_of(trunk, 10)
    write(branch, 15, tracked=15)
    assert find_checkpoint(run_with(save=branch, **asked)).folder == folder_of(branch, 15)
    assert find_checkpoint(run_with(save=trunk, **asked)).folder == folder_of(trunk, 10)


def saved_with(save: Path, iteration: int, ckpt_step: int | None, load: Path | None = None) -> None:
    """A checkpoint that says with which flags it was trained."""
    settings = {"ckpt_step": ckpt_step, "load": str(load) if load else None}
    shutil.rmtree(folder_of(save, iteration), ignore_errors=True)
    write(save, iteration, tracked=iteration)
    (folder_of(save, iteration) / CONFIG).write_text(json.dumps({"checkpoint": settings}))
    seal(folder_of(save, iteration))


def test_a_step_back_is_taken_once(tmp_path):
    """A batch script that says --ckpt-step 10 and is started again keeps what it has trained since."""
    write(tmp_path, 10, 20, 30, tracked=30)
    asked = {"save": tmp_path, "ckpt_step": 10}
    assert chosen(**asked) == ("iter_0000010", ())
    saved_with(tmp_path, 15, ckpt_step=10)
    name, (word,) = chosen(**asked)
    assert name == "iter_0000015" and word.endswith(f"tools/checkpoint.py rollback {tmp_path} 10")
    saved_with(tmp_path, 20, ckpt_step=10, load=tmp_path)
    assert chosen(**asked)[0] == chosen(**asked, load=tmp_path)[0] == "iter_0000020"
    assert chosen(save=tmp_path, ckpt_step=15)[0] == "iter_0000015"  # another step is another wish
    rollback(tmp_path, 10)
    assert chosen(**asked) == ("iter_0000010", ())
    saved_with(tmp_path, 40, ckpt_step=None)
    assert chosen(**asked) == ("iter_0000010", ())
    saved_with(tmp_path, 40, ckpt_step=10, load=tmp_path / "other")
    assert chosen(**asked) == ("iter_0000010", ())


def test_rollback(tmp_path):
    write(tmp_path, 10, 20, 30, tracked=30)
    assert rollback(tmp_path, 10) == [20, 30]
    assert chosen(save=tmp_path) == ("iter_0000010", ())
    damage(tmp_path, 20)
    for iteration, complaint in {20: "has 0 bytes", 25: "no such folder; iterations there: 10, 20, 30"}.items():
        with pytest.raises(ValueError, match=f"iter_00000{iteration} is not intact: .*{complaint}"):
            rollback(tmp_path, iteration)
    assert latest_iteration(tmp_path) == 10


def test_prune_keeps_what_a_run_would_continue_from(tmp_path):
    write(tmp_path, 10, 20, 30, tracked=30)
    damage(tmp_path, 30)
    assert prune(tmp_path, 0, 100) == [10]
    assert saved_iterations(tmp_path) == [20, 30]
    damage(tmp_path, 20)
    with pytest.raises(ValueError, match="no checkpoint to start from"):
        prune(tmp_path, 0, 100)
    assert saved_iterations(tmp_path) == [20, 30]


def test_hashes_on_request(tmp_path):
    write(tmp_path, 10, 20, tracked=20)
    (folder_of(tmp_path, 20) / "__0_0.distcp").write_bytes(bytes(99) + b"x")
    run = run_with(save=tmp_path)
    assert find_checkpoint(run, "size").folder == folder_of(tmp_path, 20)
    assert find_checkpoint(run, "hash").folder == folder_of(tmp_path, 10)


def test_finetuning_needs_weights_to_start_from(tmp_path):
    with pytest.raises(ValueError, match=f"--finetune: --load {tmp_path}/none: no {TRACKER} there; give the folder"):
        chosen(load=tmp_path / "none", save=tmp_path / "new", finetune=True)
    with pytest.raises(ValueError, match="--finetune needs --load"):
        chosen(save=tmp_path / "new", finetune=True)
    write(tmp_path / "new", 10, tracked=10)
    assert chosen(load=tmp_path / "none", save=tmp_path / "new", finetune=True)[0] == "iter_0000010"


@pytest.mark.parametrize("settings", [{}, {"finetune": True}, {"ckpt_step": 10}])
def test_an_export_is_no_checkpoint_to_load(tmp_path, settings):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"--load {tmp_path}: is a Hugging Face model.*tools/import_hf\.py --model"):
        chosen(load=tmp_path, **settings)


def test_one_checkpoint_is_no_folder_of_checkpoints(tmp_path):
    one = folder_of(write(tmp_path, 10, tracked=10), 10)
    (one / CONFIG).write_text("{}")
    with pytest.raises(ValueError, match=f"{one}: is one checkpoint; give --load {tmp_path} and --ckpt-step 10"):
        chosen(load=one)
