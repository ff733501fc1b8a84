"""The writer of metrics to metrics.jsonl, TensorBoard and Weights & Biases, used on one rank."""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mesh_megatron.checkpoint.metrics_file import METRICS_FILE, parse_record
from mesh_megatron.config.run import RunConfig
from mesh_megatron.training.metrics.wandb import WandbLog

logger = logging.getLogger(__name__)

_NOT_PLOTTED = ("iteration", "consumed tokens")
_WAITING = 1 << 22  # bytes of records that are buffered while the disk is full


class MetricsWriter:
    """Writes records to all places that the settings name, and continues the files of an interrupted run."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self._file: Any = None
        self._board: Any = None
        self._wandb: WandbLog | None = None
        self._blocked = False
        self._plotted: tuple[int, set[str]] = (0, set())
        """An iteration and those of its numbers that TensorBoard already has, though they will be measured again."""

    def open(self, iteration: int, evaluated: bool = True) -> None:
        """Open the files of a run that continues at ``iteration`` and drop the records that will be written again.

        These are the records after ``iteration`` and, unless ``evaluated``, the evaluation at ``iteration``. With
        --eval-only no file is opened.
        """
        save, settings = self.run.checkpoint.save, self.run.logging
        if self.run.training.eval_only:
            return
        if save is not None:
            path = save / METRICS_FILE
            try:
                self._plotted = iteration, keep_until(path, iteration, evaluated)
            except OSError as error:
                logger.warning(f"{METRICS_FILE} may hold some iterations twice: {error}")
            self._file = path.open("a", buffering=_WAITING, encoding="utf-8")
        folder = settings.tensorboard_dir or (save / "tensorboard" if save is not None else None)
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            # Purge at iteration 0 too: an attempt killed before its first checkpoint has left points.
            self._board = SummaryWriter(str(folder), purge_step=iteration + 1)
        if settings.wandb_project is not None:
            self._wandb = WandbLog(self.run)

    def write(self, record: Mapping[str, Any]) -> None:
        """Note and plot ``record``: its ``iteration`` and other numbers, named as in Megatron-LM."""
        self.note(record)
        self.plot(record)

    def note(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl. On a full disk it is buffered, and training continues."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._flush()

    def plot(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of ``record`` to TensorBoard and Weights & Biases; after an error no more are sent there."""
        numbers = {
            name: value for name, value in record.items() if isinstance(value, int | float) and name not in _NOT_PLOTTED
        }
        if self._board is not None:
            with self._giving_up_the_board():
                iteration, plotted = record["iteration"], self._plotted
                for name in numbers.keys() - (plotted[1] if iteration == plotted[0] else set()):
                    self._board.add_scalar(name, numbers[name], iteration)
                self._board.flush()
        if self._wandb is not None:
            self._wandb.log(record["iteration"], numbers)

    @contextlib.contextmanager
    def _giving_up_the_board(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._board = None
            logger.warning(f"no more records for TensorBoard in this run: {error}")

    def _flush(self) -> None:
        try:
            self._file.flush()
            self._blocked = False
        except OSError as error:
            if not self._blocked:
                logger.warning(f"{METRICS_FILE} waits until it can be written: {error}")
            self._blocked = True

    def close(self) -> None:
        """Write what is buffered, if possible, and close all files."""
        if self._file is not None:
            self._flush()
            if not self._blocked:
                self._file.close()
        if self._board is not None:
            with self._giving_up_the_board():
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def keep_until(path: Path, iteration: int, evaluated: bool = True) -> set[str]:
    """Drop records after ``iteration``, its evaluation unless ``evaluated``, and a last line that is cut off.

    Returns the keys that were dropped from ``iteration`` itself. The file, which may be long, is read backwards only as
    far as necessary. Raises ``OSError`` if it cannot be read or written.
    """
    if not path.exists() or path.stat().st_size == 0:
        return set()
    with path.open("rb+") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        tail = list(_doubtful_lines(content, iteration, evaluated))
        if content[-1:] != b"\n" and (not tail or tail[0].stays):  # only its end of line is missing
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
    _drop(path, tail)
    records = [parse_record(line.text) or {} for line in tail if not line.stays]
    return {name for record in records if record.get("iteration") == iteration for name in record}


def _drop(path: Path, tail: list[_Line]) -> None:
    """Remove the lines of ``tail`` (newest first) that do not stay from the end of the file."""
    dropped = [line.place for line in tail if not line.stays]
    if not dropped:
        return
    kept = [line.text for line in reversed(tail) if line.stays and line.place > dropped[-1]]
    if not kept:
        os.truncate(path, dropped[-1])
        return
    temporary = path.with_suffix(".tmp")
    shutil.copyfile(path, temporary)
    os.truncate(temporary, dropped[-1])
    with temporary.open("ab") as file:
        file.writelines(line.rstrip(b"\n") + b"\n" for line in kept)
    os.replace(temporary, path)


class _Line(NamedTuple):
    place: int
    """Offset in the file, in bytes."""
    text: bytes
    stays: bool


def _doubtful_lines(content: mmap.mmap, iteration: int, evaluated: bool) -> Iterator[_Line]:
    """Yield the lines from the last one back to the first of ``iteration``."""
    end = len(content)
    while end > 0:
        start = content.rfind(b"\n", 0, end - 1) + 1
        line, end = content[start:end], start
        record = parse_record(line)
        if record is not None and record["iteration"] < iteration:
            return
        evaluation = record is not None and any("lm loss v" in name for name in record)
        stays = record is not None and record["iteration"] == iteration and (evaluated or not evaluation)
        yield _Line(start, line, stays)
