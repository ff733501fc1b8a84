"""Metrics on a full disk and in continued runs."""

from __future__ import annotations

import itertools
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mesh_megatron.checkpoint.metrics_file import read_metrics
from mesh_megatron.config.checkpoint import CheckpointConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.training.metrics import writer as writer_module
from mesh_megatron.training.metrics.writer import MetricsWriter, keep_until


@pytest.fixture(autouse=True)
def silent_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's thread ends with an error when its disk is full."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Limit the size of files, in place of a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_records_wait_for_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(RunConfig(checkpoint=CheckpointConfig(save=tmp_path)))
    writer.open(0)
    writer.write({"iteration": 1, "lm loss": 5.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with files_of_at_most(size + 10):  # the next record is cut off
        for iteration in (2, 3):
            writer.write({"iteration": iteration, "lm loss": 4.0})
    assert [record["iteration"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert caplog.text.count("metrics.jsonl waits until it can be written") == 1
    writer.write({"iteration": 4, "lm loss": 3.0})
    writer.close()
    assert [record["iteration"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_disk_that_stays_full_fails_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(RunConfig(checkpoint=CheckpointConfig(save=tmp_path)))
    writer.open(0)
    with files_of_at_most(0):
        for iteration in (1, 2, 3):
            writer.write({"iteration": iteration, "lm loss": 4.0})
        writer.close()
    warnings = caplog.text
    assert "metrics.jsonl waits until it can be written" in warnings and "no more records for TensorBoard" in warnings


def test_lines_that_cannot_wait_are_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_WAITING", 1 << 14)
    writer = MetricsWriter(RunConfig(checkpoint=CheckpointConfig(save=tmp_path)))
    writer.open(0)
    with files_of_at_most(0):
        for iteration in range(1, 1001):
            writer.note({"iteration": iteration, "lm loss": 4.0})
    writer.note({"iteration": 1001})
    writer.close()
    written = [record["iteration"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert written[-1] == 1001 and written[:-1] == list(range(1, len(written))) and 100 < len(written) < 1000


def test_what_is_noted_is_not_plotted(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(RunConfig(checkpoint=CheckpointConfig(save=tmp_path)))
    writer.open(0)
    writer.note({"iteration": 1, "lm loss": 5.0})
    writer.plot({"iteration": 2, "lm loss": 4.0})
    writer.write({"iteration": 3, "lm loss": 3.0})
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [record["iteration"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]
    assert [event.step for event in board.Scalars("lm loss")] == [2, 3]


def steps_on_the_board(save: Path, tag: str = "lm loss") -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.step for event in EventAccumulator(str(save / "tensorboard")).Reload().Scalars(tag)]


@pytest.fixture
def starts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every file another second of creation, by which TensorBoard orders files."""
    seconds = itertools.count(int(time.time()))
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))


@pytest.mark.parametrize("checkpoint", [0, 2])
def test_a_killed_attempt_leaves_no_step_twice(tmp_path: Path, starts_apart: None, checkpoint: int) -> None:
    """The run continues from a checkpoint, or starts again from the beginning."""
    run = RunConfig(checkpoint=CheckpointConfig(save=tmp_path))
    killed, again = MetricsWriter(run), MetricsWriter(run)
    killed.open(0)
    for iteration in (1, 2, 3):
        killed.write({"iteration": iteration, "lm loss": 5.0})
    assert steps_on_the_board(tmp_path) == [1, 2, 3]
    again.open(checkpoint)
    for iteration in range(checkpoint + 1, 5):
        again.write({"iteration": iteration, "lm loss": 5.0})
    again.close()
    assert steps_on_the_board(tmp_path) == [1, 2, 3, 4]
    assert [record["iteration"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_an_evaluation_that_is_repeated_is_on_the_board_once(tmp_path: Path, starts_apart: None) -> None:
    """The evaluation is due in the checkpoint; a killed attempt had already made it."""
    run = RunConfig(checkpoint=CheckpointConfig(save=tmp_path))
    first = MetricsWriter(run)
    first.open(0)
    first.write({"iteration": 2, "lm loss": 5.0})
    first.close()
    for last in (3, 4):
        attempt = MetricsWriter(run)
        attempt.open(2, evaluated=False)
        attempt.write({"iteration": 2, "lm loss validation": 4.5})
        attempt.write({"iteration": 3, "lm loss": 4.0})
        attempt.write({"iteration": last, "lm loss validation": 4.0})
    assert steps_on_the_board(tmp_path) == [2, 3]
    assert steps_on_the_board(tmp_path, "lm loss validation") == [2, 4]


STEPS = [f'{{"iteration": {iteration}, "lm loss": 4.0}}\n' for iteration in range(1, 6)]
EVALUATION = '{"iteration": 4, "lm loss validation": 4.0}\n'
PROBES = '{"iteration": 4, "state norm/h(0)": 1.0}\n'


@pytest.mark.parametrize(
    ("lines", "iteration", "evaluated", "kept"),
    [
        (STEPS, 5, True, STEPS),
        (STEPS, 9, True, STEPS),
        (STEPS, 3, True, STEPS[:3]),
        (STEPS, 0, True, []),
        ([], 3, True, []),
        ([*STEPS[:4], EVALUATION, STEPS[4]], 4, True, [*STEPS[:4], EVALUATION]),
        ([*STEPS[:4], EVALUATION, STEPS[4]], 4, False, STEPS[:4]),
        ([*STEPS[:4], EVALUATION, PROBES, STEPS[4]], 4, False, [*STEPS[:4], PROBES]),
        ([*STEPS[:4], EVALUATION, PROBES[:-1]], 4, False, [*STEPS[:4], PROBES]),
        ([*STEPS[:4], STEPS[4][:-7]], 9, True, STEPS[:4]),
        ([*STEPS[:4], STEPS[4][:-1]], 9, True, STEPS),
        ([*STEPS[:4], STEPS[4][:-1]], 5, True, STEPS),
        ([*STEPS[:4], STEPS[4][:-1]], 3, True, STEPS[:3]),
        ([STEPS[0][:-7]], 3, True, []),
    ],
)
def test_what_an_earlier_attempt_wrote_beyond_a_checkpoint_is_dropped(
    tmp_path: Path, lines: list[str], iteration: int, evaluated: bool, kept: list[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines))
    keep_until(path, iteration, evaluated)
    assert path.read_text() == "".join(kept)
    assert list(tmp_path.iterdir()) == [path]


def test_a_copy_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(STEPS))
    with files_of_at_most(20), pytest.raises(OSError):
        keep_until(path, 2)
    assert path.read_text() == "".join(STEPS) and list(tmp_path.iterdir()) == [path]
