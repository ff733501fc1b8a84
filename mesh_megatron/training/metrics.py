"""Where numbers go: metrics.jsonl, TensorBoard, Weights & Biases. One rank writes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh_megatron.config.run import RunConfig
from mesh_megatron.training.wandb_log import WandbLog

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
            keep_until(path, iteration, evaluated)
            self._file = path.open("a", buffering=_WAITING, encoding="utf-8")
        folder = logging.tensorboard_dir or (save / "tensorboard" if save is not None else None)
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=iteration + 1 if iteration else None)
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
            try:
                for name, value in numbers.items():
                    self._board.add_scalar(name, value, record["iteration"])
                self._board.flush()
            except OSError as error:
                self._board = None
                _warn(f"no more records for TensorBoard in this run: {error}")
        if self._wandb is not None:
            self._wandb.log(record["iteration"], numbers)

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


def keep_until(path: Path, iteration: int, evaluated: bool = True) -> None:
    """Drop records after ``iteration``, and its evaluation unless ``evaluated``; written anew, then renamed."""
    if not path.exists():
        return

    def keep(record: dict[str, Any]) -> bool:
        again = not evaluated and record["iteration"] == iteration and any("lm loss v" in name for name in record)
        return record["iteration"] <= iteration and not again

    kept = [record for record in read_metrics(path) if keep(record)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
