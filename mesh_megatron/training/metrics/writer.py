"""Where numbers go: metrics.jsonl, TensorBoard, Weights & Biases. One rank writes."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mesh_megatron.config.run import RunConfig
from mesh_megatron.training.metrics.wandb import WandbLog

METRICS_FILE = "metrics.jsonl"
_NOT_PLOTTED = ("iteration", "consumed tokens")
_WAITING = 1 << 22  # bytes of records that may wait for room on a full disk


class MetricsWriter:
    """Writes one record to every place that was asked for, and takes up a run where it was interrupted."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self._file: Any = None
        self._board: Any = None
        self._wandb: WandbLog | None = None
        self._blocked = False
        self._plotted: tuple[int, set[str]] = (0, set())
        """Numbers of an iteration that TensorBoard has already, though they are measured again."""

    def open(self, iteration: int, evaluated: bool = True) -> None:
        """``iteration`` is where the run continues: what earlier attempts wrote beyond it will be written again, and
        unless ``evaluated`` the evaluation that belongs to it.

        An evaluation of its own (--eval-only) leaves the files of the training run alone.
        """
        save, logging = self.run.checkpoint.save, self.run.logging
        if self.run.training.eval_only:
            return
        if save is not None:
            path = save / METRICS_FILE
            try:
                self._plotted = iteration, keep_until(path, iteration, evaluated)
            except OSError as error:
                _warn(f"{METRICS_FILE} keeps records that are written again: {error}")
            self._file = path.open("a", buffering=_WAITING, encoding="utf-8")
        folder = logging.tensorboard_dir or (save / "tensorboard" if save is not None else None)
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            # Also from 0: an attempt that was killed before its first checkpoint has left points too.
            self._board = SummaryWriter(str(folder), purge_step=iteration + 1)
        if logging.wandb_project is not None:
            self._wandb = WandbLog(self.run)

    def write(self, record: Mapping[str, Any]) -> None:
        """Note and plot ``record``, which has ``iteration``; its other numbers are named as Megatron-LM names them."""
        self.note(record)
        self.plot(record)

    def note(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl. It waits for room on a disk that is full, and stops nothing."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._flush()

    def plot(self, record: Mapping[str, Any]) -> None:
        """Its numbers in TensorBoard and Weights & Biases; given up there once they cannot be written."""
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
            _warn(f"no more records for TensorBoard in this run: {error}")

    def _flush(self) -> None:
        try:
            self._file.flush()
            self._blocked = False
        except OSError as error:
            if not self._blocked:
                _warn(f"{METRICS_FILE} waits until it can be written: {error}")
            self._blocked = True

    def close(self) -> None:
        if self._file is not None:
            self._flush()
            if not self._blocked:
                self._file.close()
        if self._board is not None:
            with self._giving_up_the_board():
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def keep_until(path: Path, iteration: int, evaluated: bool = True) -> set[str]:
    """Drop records after ``iteration``, its evaluation unless ``evaluated``, and a last line that was cut off.

    Returns the names of what was dropped of ``iteration`` itself. The file is read from its end only as far as it has
    to be: that of a long run is long.
    """
    if not path.exists() or path.stat().st_size == 0:
        return set()
    with path.open("rb+") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        tail = list(_doubtful_lines(content, iteration, evaluated))
        if content[-1:] != b"\n" and (not tail or tail[0].stays):  # cut off before its end of line only
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
    _drop(path, tail)
    records = [_parsed(line.text) or {} for line in tail if not line.stays]
    return {name for record in records if record.get("iteration") == iteration for name in record}


def _drop(path: Path, tail: list[_Line]) -> None:
    """Leave those lines of the file's ``tail``, newest first, that stay."""
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
    with temporary.open("ab") as anew:
        anew.writelines(line.rstrip(b"\n") + b"\n" for line in kept)
    os.replace(temporary, path)


class _Line(NamedTuple):
    place: int
    text: bytes
    stays: bool


def _doubtful_lines(content: mmap.mmap, iteration: int, evaluated: bool) -> Iterator[_Line]:
    """Lines from the last one back to those of ``iteration``."""
    end = len(content)
    while end > 0:
        start = content.rfind(b"\n", 0, end - 1) + 1
        line, end = content[start:end], start
        record = _parsed(line)
        if record is not None and record["iteration"] < iteration:
            return
        evaluation = record is not None and any("lm loss v" in name for name in record)
        stays = record is not None and record["iteration"] == iteration and (evaluated or not evaluation)
        yield _Line(start, line, stays)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None of a line that was cut off."""
    with contextlib.suppress(ValueError):
        return json.loads(line)
    return None


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
