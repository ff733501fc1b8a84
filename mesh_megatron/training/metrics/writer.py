"""The writer of metrics to metrics.jsonl, TensorBoard and Weights & Biases, used on one rank."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mesh_megatron.checkpoint.metrics_file import METRICS_FILE, parse_record
from mesh_megatron.config.run import RunConfig
from mesh_megatron.training.metrics.wandb import WandbLog
from mesh_megatron.util.atomic_files import replace_when_complete

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
    """Drop records after ``iteration``, its evaluation unless ``evaluated``, and lines that are cut off.

    Returns the keys that were dropped from ``iteration`` itself. Raises ``OSError`` if the file cannot be read or its
    filtered copy cannot be written.
    """
    dropped: set[str] = set()
    if not path.exists():
        return dropped
    with replace_when_complete(path) as copy, path.open("rb") as lines, copy.open("wb") as kept:
        for line in lines:
            record = parse_record(line)
            if record is not None and _stays(record, iteration, evaluated):
                kept.write(line.rstrip(b"\n") + b"\n")
            elif record is not None and record["iteration"] == iteration:
                dropped |= record.keys()
    return dropped


def _stays(record: dict[str, Any], iteration: int, evaluated: bool) -> bool:
    is_evaluation = any("lm loss v" in name for name in record)
    return record["iteration"] < iteration or (record["iteration"] == iteration and (evaluated or not is_evaluation))
