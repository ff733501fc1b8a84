"""Which rank do all the others wait for? Every rank says where it is, and one tells before the collectives time out."""

from __future__ import annotations

import json
import linecache
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import FrameType

from torch.distributed.distributed_c10d import _get_default_store

from mesh_megatron.platform import device
from mesh_megatron.training.loop import Part, Trainer

# Standing this share of the collectives' timeout at one place is told, so that the rest is time enough to tell it.
_SHARE = 0.7
_BEATS = 20  # within that time
# Where a rank waits for others, the line that its Python code stands at names one of these, or lies in torch's own.
_WAITS = (".wait(", "barrier(", "synchronize(", "all_reduce(", "all_gather", ".tolist(", ".item(")
_WAITING_FILES = ("torch/distributed", "p2p_communication.py")


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    iteration: int
    """Steps it has completed."""
    line: str
    """File, line and text of what its main thread does."""
    waits: bool
    """Whether that is waiting for others (or for the device)."""
    since: float
    """Unix time from which on it has been there."""
    seen: float
    """Unix time at which it said so."""
    host: str


class Watchdog(Part):
    """A thread that watches this rank's main thread during training; see the module's text."""

    def __init__(self, timeout_minutes: float) -> None:
        self.patience = timeout_minutes * 60 * _SHARE
        # A connection of its own: the other is locked while this rank waits in the store, as nccl's first calls do.
        self.store = _get_default_store().clone()  # type: ignore[attr-defined]
        self._main = threading.main_thread().ident
        self._done = threading.Event()

    def start(self, trainer: Trainer) -> None:
        self._thread = threading.Thread(target=self._watch, args=(trainer,), daemon=True)
        self._thread.start()

    def finish(self, trainer: Trainer) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self, trainer: Trainer) -> None:
        before, since, told = None, time.time(), -1
        while not self._done.wait(self.patience / _BEATS):
            frame, iteration = sys._current_frames().get(self._main or 0), trainer.state.iteration
            if frame is None:
                return
            stands = (iteration, *((id(at), at.f_lasti) for at in _callers(frame)))
            now = time.time()
            if stands != before:
                before, since = stands, now
            try:
                self.store.set(_key(device.rank()), json.dumps(asdict(place_of(frame, iteration, since, now))))
                if now - since >= self.patience and told < iteration:
                    told = iteration
                    self._tell(iteration, now)
            except (RuntimeError, OSError):  # the store lives with rank 0 or the launcher, which is gone
                return

    def _tell(self, iteration: int, now: float) -> None:
        """One rank prints for all."""
        if self.store.add(f"mesh_megatron/watchdog/told/{iteration}", 1) > 1:
            return
        keys = [_key(rank) for rank in range(device.world_size())]
        places = [Place(**json.loads(self.store.get(key))) if self.store.check([key]) else None for key in keys]
        silent = 4 * self.patience / _BEATS
        print(f"WARNING: {report(places, now, silent)}", file=sys.stderr, flush=True)


def place_of(frame: FrameType, iteration: int, since: float, now: float) -> Place:
    """``frame`` is what the main thread executes."""
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    file = frame.f_code.co_filename
    waits = any(part in file for part in _WAITING_FILES) or any(word in text for word in _WAITS)
    line = f"{'/'.join(file.split('/')[-3:])}:{frame.f_lineno} {text}"
    return Place(iteration, line, waits, since, now, socket.gethostname())


def report(places: Sequence[Place | None], now: float, silent_seconds: float) -> str:
    """Step and ranks to blame: those that say nothing any more, else those that do not wait, else those behind."""
    known = {rank: place for rank, place in enumerate(places) if place is not None}
    step = min(place.iteration for place in known.values()) + 1
    quiet = [rank for rank, place in enumerate(places) if place is None or now - place.seen > silent_seconds]
    busy = [rank for rank, place in known.items() if not place.waits and rank not in quiet]
    behind = [rank for rank, place in known.items() if place.iteration + 1 == step and rank not in quiet]
    suspects = quiet + busy or (behind if len(behind) < len(known) else [])
    lines = [f"step {step} does not end"]
    for rank in suspects[:8]:
        place = places[rank]
        if place is None:
            lines.append(f"rank {rank} has never said where it is")
        elif rank in quiet:
            lines.append(f"rank {rank} on {place.host} has given no sign of life for {now - place.seen:.0f} s")
        else:
            lines.append(
                f"rank {rank} on {place.host} has been in step {place.iteration + 1} for {now - place.since:.0f} s at "
                f"{place.line}"
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
