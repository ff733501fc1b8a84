"""A rank that cannot write its part of a checkpoint: all ranks learn it, none waits, and the next one is whole."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import rank_preload  # noqa: F401  (before megatron.core)
from cases import OVERLAP, run_config
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from rank_pool import RankPool
from torch.distributed.checkpoint import FileSystemWriter
from training_runs import build_trainer, checkpointer_of, steps

from mesh_megatron.checkpoint.folder import SaveFailed, folder_of, latest_iteration
from mesh_megatron.checkpoint.manifest import find_damage, read_manifest
from mesh_megatron.config.run import RunConfig
from mesh_megatron.platform import device
from mesh_megatron.training import checkpointer as checkpointer_module

pytestmark = pytest.mark.full

# What rank 0 alone writes, and where it is written.
ALONE: dict[str, tuple[Any, str]] = {
    "index": (FileSystemWriter, "finish"),
    "format": (checkpointer_module, "write_format"),
    "manifest": (checkpointer_module, "write_manifest"),
    "settings": (checkpointer_module, "write_atomically"),
}
if hasattr(common, "TorchCommonSaveStrategy"):
    ALONE["common-state"] = (common.TorchCommonSaveStrategy, "save_common")


@contextmanager
def small_disk(ranks: tuple[int, ...]) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if device.rank() in ranks:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def replaced(rank: int, owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """``function`` in the place of ``owner.name``, on one rank."""
    original = getattr(owner, name)
    if device.rank() == rank:
        setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def failing(number: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def no_room_for_a_process() -> AbstractContextManager[None]:
    return replaced(1, os, "fork", failing(errno.ENOMEM))


def killed_writer() -> AbstractContextManager[None]:
    """As the kernel does for want of memory."""

    def die(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return replaced(1, FileSystemWriterAsync, "write_preloaded_data", die)


def no_space_for(what: str) -> AbstractContextManager[None]:
    return replaced(0, *ALONE[what], failing(errno.ENOSPC))


def save_three_times(run: RunConfig, obstacle: Any, *args: Any) -> list[str]:
    """Checkpoints of steps 1, 2 and 3, of which the second meets the obstacle; what it raised."""
    trainer = build_trainer(run)
    checkpointer = checkpointer_of(trainer)
    failures = []
    for step in (1, 2, 3):
        steps(trainer, 1)
        try:
            if step == 2:
                with obstacle(*args):
                    checkpointer.save()
                    checkpointer.finish_pending(wait=True)
            else:
                checkpointer.save()
        except SaveFailed as failure:
            failures.append(str(failure))
    checkpointer.close()
    return failures


def settings(save: Path, in_background: bool) -> RunConfig:
    run = run_config("", OVERLAP, 4)
    return dataclasses.replace(
        run, checkpoint=dataclasses.replace(run.checkpoint, save=save, async_save=in_background)
    )  # fmt: skip


def check_the_others_are_whole(save: Path, failures: list[list[str]], reason: str) -> None:
    assert [len(of_rank) for of_rank in failures] == [1, 1]
    assert all("checkpoint iter_0000002 could not be written" in of_rank[0] for of_rank in failures)
    assert "checkpoint iter_0000002 could not be written" in failures[0][0] and reason in failures[0][0]
    assert sorted(path.name for path in save.iterdir() if "iter_" in path.name) == ["iter_0000001", "iter_0000003"]
    assert latest_iteration(save) == 3
    for iteration in (1, 3):
        assert find_damage(folder_of(save, iteration), "hash") == []


@pytest.mark.parametrize("in_background", [False, True], ids=["now", "later"])
def test_a_rank_whose_disk_is_full(ranks: RankPool, tmp_path: Path, in_background: bool) -> None:
    failures = ranks.run(2, save_three_times, settings(tmp_path, in_background), small_disk, (1,), timeout=120)
    check_the_others_are_whole(tmp_path, failures, "writing on rank 1: ")
    assert {name[:4] for name in read_manifest(folder_of(tmp_path, 3)) if name.endswith("distcp")} == {"__0_", "__1_"}


def test_a_rank_that_cannot_start_a_process(ranks: RankPool, tmp_path: Path) -> None:
    failures = ranks.run(2, save_three_times, settings(tmp_path, True), no_room_for_a_process, timeout=120)
    check_the_others_are_whole(tmp_path, failures, "rank 1: no process could be started to write it: [Errno 12]")


def test_a_rank_whose_writing_process_is_killed(ranks: RankPool, tmp_path: Path) -> None:
    failures = ranks.run(2, save_three_times, settings(tmp_path, True), killed_writer, timeout=120)
    check_the_others_are_whole(tmp_path, failures, "rank 1: the process that wrote it was killed by SIGKILL")


@pytest.mark.parametrize("what", ALONE)
def test_what_rank_zero_writes_alone(ranks: RankPool, tmp_path: Path, what: str) -> None:
    failures = ranks.run(2, save_three_times, settings(tmp_path, False), no_space_for, what, timeout=120)
    check_the_others_are_whole(tmp_path, failures, "rank 0: ")
    assert os.strerror(errno.ENOSPC) in failures[0][0]
