"""Train the cells of a grid, several at a time, each in a process and a folder of its own; done cells stay as they are.

A cell is done when its metrics.jsonl holds the evaluation after its last step. One that was interrupted goes on from
its newest checkpoint, which is what ``pretrain_mesh.py`` does by itself.
"""

from __future__ import annotations

import fcntl
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from benchmarks.study.corpus import ROOT, Tokens
from benchmarks.study.grid import Cell
from mesh_megatron.checkpoint.metrics_file import METRICS_FILE, read_metrics
from mesh_megatron.util.cores import cores

VALIDATION = "lm loss validation"


def final_loss(folder: Path, cell: Cell) -> float | None:
    """The cell's validation loss after its last step; None while it is not done."""
    return dict(validation_curve(folder, cell)).get(cell.iterations)


def validation_curve(folder: Path, cell: Cell) -> list[tuple[int, float]]:
    """(iteration, validation loss) pairs so far."""
    return [(record["iteration"], record[VALIDATION]) for record in records(folder, cell) if VALIDATION in record]


def records(folder: Path, cell: Cell) -> list[dict[str, Any]]:
    """Everything that the cell has logged so far."""
    metrics = folder / cell.name / METRICS_FILE
    return read_metrics(metrics) if metrics.exists() else []


def settings_file(folder: Path, cell: Cell) -> Path:
    """The cell's ``--config`` file, written when the cell is started."""
    return folder / cell.name / "cell.yaml"


def check_settings(folder: Path, cell: Cell) -> None:
    """``ValueError`` where the cell's folder was started with other settings."""
    file = settings_file(folder, cell)
    if file.exists() and file.read_text(encoding="utf-8") != yaml.safe_dump(cell.settings):
        raise ValueError(f"{file} has other settings than the grid: delete its folder or give another --output")


def write_settings(folder: Path, cell: Cell) -> None:
    file = settings_file(folder, cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(cell.settings), encoding="utf-8")
    temporary.replace(file)


def command(folder: Path, cell: Cell, tokens: Tokens) -> list[str]:
    """Return the command that trains the cell."""
    here, settings = folder / cell.name, settings_file(folder, cell)
    flags = ["--config", settings, "--save", here, "--summary-json", here / "summary.json", *tokens.flags]
    # an index cache of its own: cells of one seed would otherwise write the same files at the same time
    return [sys.executable, str(ROOT / "pretrain_mesh.py"), *map(str, flags), "--data-cache-path", str(here / "cache")]


class Trainer:
    """Runs cells on ``places``: each a dict of environment variables, one cell at a time on each."""

    def __init__(self, folder: Path, tokens: Tokens, places: Sequence[dict[str, str]]) -> None:
        self.folder, self.tokens, self.places = folder, tokens, places
        self._free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for place in places:
            self._free.put(place)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    def train(self, cells: Sequence[Cell]) -> list[Cell]:
        """Train those that are not done; the cells that failed. An interrupt leaves checkpoints and is passed on."""
        for cell in cells:
            check_settings(self.folder, cell)
        waiting = [cell for cell in cells if final_loss(self.folder, cell) is None]
        failed = []
        bar = tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="cell", smoothing=0)
        with _locked(self.folder) as lock, ThreadPoolExecutor(len(self.places)) as pool, bar:
            futures = {pool.submit(self._train_one, cell, lock): cell for cell in waiting}
            try:
                for future in as_completed(futures):
                    cell, code = futures[future], future.result()
                    loss = final_loss(self.folder, cell)
                    if loss is None:
                        failed.append(cell)
                    bar.write(f"{cell.name}: {f'loss {loss:.4f}' if loss is not None else f'FAILED, exit code {code}'}")
                    bar.update()
            except BaseException:
                self._stopping = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._running):
                    process.send_signal(signal.SIGTERM)  # they save a checkpoint and leave
                raise
        return failed

    def _train_one(self, cell: Cell, lock: int) -> int:
        place = self._free.get()
        log = self.folder / cell.name / "log.txt"
        try:
            write_settings(self.folder, cell)
            with log.open("ab") as out:
                # in a session of its own: Ctrl-C reaches this program alone, which then stops the cells;
                # the lock goes along, so that a cell outliving a killed study keeps a second one away
                process = subprocess.Popen(
                    command(self.folder, cell, self.tokens), cwd=ROOT, env=os.environ | place,
                    stdout=out, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=(lock,),
                )  # fmt: skip
                self._running.add(process)
                if self._stopping:
                    process.send_signal(signal.SIGTERM)
                try:
                    return process.wait()
                finally:
                    self._running.discard(process)
        finally:
            self._free.put(place)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """One study a folder: an open file that holds the lock; ``ValueError`` while another holds it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"--output {folder}: another study, or a cell of a killed one, runs there") from error
        yield file.fileno()


def places(workers: int | None, gpus: int) -> list[dict[str, str]]:
    """Environments to run cells in: one for each GPU, else one thread for each core; ``workers`` limits them.

    ``OMP_NUM_THREADS`` of this process, if it is set, is that of every cell.
    """
    count = workers or gpus or cores()
    threads: dict[str, Any] = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // count))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(gpus)]
    return [threads | ({"CUDA_VISIBLE_DEVICES": names[number % gpus]} if gpus else {}) for number in range(count)]
