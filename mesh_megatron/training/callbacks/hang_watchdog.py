"""A watchdog for hangs: it reports which ranks the others wait for, before the collectives time out.

A thread of every rank records in the store what the main thread is doing; one rank prints the report for all.
"""

from __future__ import annotations

import json
import linecache
import logging
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import FrameType

from torch.distributed.distributed_c10d import _get_default_store

from mesh_megatron.platform import device
from mesh_megatron.training.start_clock import StartClock
from mesh_megatron.training.trainer import Callback, Trainer

logger = logging.getLogger(__name__)

# Phases before the first step, in order.
PHASES = (
    "joining the other ranks",
    "finding a checkpoint",
    "indexing data",
    "building the model",
    "loading the checkpoint",
    "evaluating",  # with --eval-only
)
# In these phases all ranks wait for rank 0, which may take longer than the timeout (``data/ranks.py``).
_UNLIMITED = ("indexing data", "finding a checkpoint")
# A hang is reported after this share of the collectives' timeout; the rest is left for printing the report.
_SHARE = 0.7
_BEATS = 20  # checks within that time
_SECONDS_TO_STOP = 5.0  # the thread may be blocked by a store that is gone
# A rank waits for others if its current line of Python contains one of these or lies in one of these files. On a GPU
# these are the lines where the host reads or copies a tensor: tests/fake_cuda meets all of them.
_WAITS = (".wait(", "barrier(", "synchronize(", "all_reduce(", "all_gather", "broadcast_object_list(")
_READS = (".tolist(", ".item(", ".to(", ".cpu(", ".masked_select(")
_WAITING_FILES = ("torch/distributed", "p2p_communication.py", "finalize_model_grads.py", "state_dict_saver.py")


@dataclass(frozen=True)
class Place:
    """The present position of a rank's main thread."""

    iteration: int
    """Completed steps; before the first step a negative index into PHASES."""
    line: str
    """File, line number and text of the current line."""
    waits: bool
    """True if the line waits for other ranks (or for the device)."""
    since: float
    """Unix time since which the rank has been there."""
    seen: float
    """Unix time of this record."""
    host: str

    @property
    def task(self) -> str:
        """The phase or the step, in words."""
        return PHASES[self.iteration] if self.iteration < 0 else f"in step {self.iteration + 1}"


class Watchdog(Callback):
    """Watches the main thread of this rank from its construction on; with one rank it only passes on the phases."""

    def __init__(self, timeout_minutes: float, clock: StartClock) -> None:
        self.patience = timeout_minutes * 60 * _SHARE
        self._clock = clock
        self._phase = -len(PHASES)
        self._trainer: Trainer | None = None
        self._main = threading.main_thread().ident
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if device.world_size() > 1:
            # The default connection is locked while the main thread waits in the store, as in NCCL's first calls.
            self.store = _get_default_store().clone()  # type: ignore[attr-defined]
            self._thread.start()

    def enter(self, phase: str) -> None:
        """Record that this rank begins with ``phase``, one of PHASES."""
        self._phase = PHASES.index(phase) - len(PHASES)
        self._clock.enter(phase)

    def start(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def stop(self) -> None:
        """Stop watching; must be called before the process group is destroyed."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(_SECONDS_TO_STOP)

    def _watch(self) -> None:
        before, since, reported = None, time.time(), -len(PHASES) - 1
        while not self._done.wait(self.patience / _BEATS):
            frame = sys._current_frames().get(self._main or 0)
            iteration = self._trainer.state.iteration if self._trainer is not None else self._phase
            if frame is None:
                return
            position = (iteration, *((id(at), at.f_lasti) for at in _callers(frame)))
            now = time.time()
            if position != before:
                before, since = position, now
            try:
                place = place_of(frame, iteration, since, now)
                self.store.set(_key(device.rank()), json.dumps(asdict(place)))
                if now - since >= self.patience and reported < iteration and place.task not in _UNLIMITED:
                    reported = iteration
                    self._report(iteration, now)
            except (RuntimeError, OSError):  # rank 0 or the launcher, which held the store, has ended
                return

    def _report(self, iteration: int, now: float) -> None:
        """Print the report, unless another rank does."""
        if self.store.add(f"mesh_megatron/watchdog/reported/{iteration}", 1) > 1:
            return
        keys = [_key(rank) for rank in range(device.world_size())]
        places = [Place(**json.loads(self.store.get(key))) if self.store.check([key]) else None for key in keys]
        silent = 4 * self.patience / _BEATS
        logger.warning(report(places, now, silent))


def place_of(frame: FrameType, iteration: int, since: float, now: float) -> Place:
    """Return the place of this rank, whose main thread executes ``frame``."""
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    file = frame.f_code.co_filename
    waits = any(name in file for name in _WAITING_FILES) or any(word in text for word in (*_WAITS, *_READS))
    line = f"{'/'.join(file.split('/')[-3:])}:{frame.f_lineno} {text}"
    return Place(iteration, line, waits, since, now, socket.gethostname())


def report(places: Sequence[Place | None], now: float, silent_seconds: float) -> str:
    """Return one line with the task that hangs and the suspected ranks.

    Suspects are the ranks without a record for ``silent_seconds`` and those that do not wait; if there are none, the
    ranks that are behind the others.
    """
    known = {rank: place for rank, place in enumerate(places) if place is not None}
    first = min(known.values(), key=lambda place: place.iteration)
    quiet = [rank for rank, place in enumerate(places) if place is None or now - place.seen > silent_seconds]
    busy = [rank for rank, place in known.items() if not place.waits and rank not in quiet]
    behind = [rank for rank, place in known.items() if place.iteration == first.iteration and rank not in quiet]
    suspects = quiet + busy or (behind if len(behind) < len(known) else [])
    lines = [f"{first.task.removeprefix('in ')} does not end"]
    for rank in suspects[:8]:
        place = places[rank]
        if place is None:
            lines.append(f"rank {rank} has never reported")
        elif rank in quiet:
            lines.append(f"rank {rank} on {place.host} has given no sign of life for {now - place.seen:.0f} s")
        else:
            lines.append(
                f"rank {rank} on {place.host} has been {place.task} for {now - place.since:.0f} s at {place.line}"
            )
    if len(suspects) > 8:
        lines.append(f"and {len(suspects) - 8} more ranks")
    if not suspects:
        rank, place = next(iter(known.items()))
        lines.append(f"every rank waits for others or its device; rank {rank} at {place.line}")
    return "; ".join(lines)


def _callers(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _key(rank: int) -> str:
    return f"mesh_megatron/watchdog/{rank}"
