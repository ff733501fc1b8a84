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
from mesh_megatron.training.trainer import Callback, Trainer

# What comes before the first step, in this order.
PHASES = (
    "joining the other ranks",
    "finding a checkpoint",
    "indexing data",
    "building the model",
    "loading the checkpoint",
    "evaluating",  # with --eval-only
)
# All wait for rank 0 there, which may take longer than any collective (``data/ranks.py``).
_UNLIMITED = ("indexing data", "finding a checkpoint")
# Standing this share of the collectives' timeout at one place is told, so that the rest is time enough to tell it.
_SHARE = 0.7
_BEATS = 20  # within that time
_SECONDS_TO_STOP = 5.0  # of a thread that may wait for a store that has died
# Where a rank waits for others, the line that its Python code stands at names one of these, or lies in a file that does
# little else. On a GPU that is where the host reads or copies a tensor: tests/fake_cuda meets all such lines.
_WAITS = (".wait(", "barrier(", "synchronize(", "all_reduce(", "all_gather", "broadcast_object_list(")
_READS = (".tolist(", ".item(", ".to(", ".cpu(", ".masked_select(")
_WAITING_FILES = ("torch/distributed", "p2p_communication.py", "finalize_model_grads.py", "state_dict_saver.py")


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    iteration: int
    """Steps it has completed; before the first step below 0, an index of PHASES."""
    line: str
    """File, line and text of what its main thread does."""
    waits: bool
    """Whether that is waiting for others (or for the device)."""
    since: float
    """Unix time from which on it has been there."""
    seen: float
    """Unix time at which it said so."""
    host: str

    @property
    def task(self) -> str:
        """What it is doing."""
        return PHASES[self.iteration] if self.iteration < 0 else f"in step {self.iteration + 1}"


class Watchdog(Callback):
    """A thread that watches this rank's main thread from its start on; see the module's text. Alone it does nothing."""

    def __init__(self, timeout_minutes: float) -> None:
        self.patience = timeout_minutes * 60 * _SHARE
        self._phase = -len(PHASES)
        self._trainer: Trainer | None = None
        self._main = threading.main_thread().ident
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if device.world_size() > 1:
            # A connection of its own: the other is locked while this rank waits in the store, as nccl's first calls do.
            self.store = _get_default_store().clone()  # type: ignore[attr-defined]
            self._thread.start()

    def enter(self, phase: str) -> None:
        """This rank begins with one of PHASES."""
        self._phase = PHASES.index(phase) - len(PHASES)

    def start(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def stop(self) -> None:
        """Watch no longer; before the store goes away."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(_SECONDS_TO_STOP)

    def _watch(self) -> None:
        before, since, told = None, time.time(), -len(PHASES) - 1
        while not self._done.wait(self.patience / _BEATS):
            frame = sys._current_frames().get(self._main or 0)
            iteration = self._trainer.state.iteration if self._trainer is not None else self._phase
            if frame is None:
                return
            stands = (iteration, *((id(at), at.f_lasti) for at in _callers(frame)))
            now = time.time()
            if stands != before:
                before, since = stands, now
            try:
                place = place_of(frame, iteration, since, now)
                self.store.set(_key(device.rank()), json.dumps(asdict(place)))
                if now - since >= self.patience and told < iteration and place.task not in _UNLIMITED:
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
    waits = any(part in file for part in _WAITING_FILES) or any(word in text for word in (*_WAITS, *_READS))
    line = f"{'/'.join(file.split('/')[-3:])}:{frame.f_lineno} {text}"
    return Place(iteration, line, waits, since, now, socket.gethostname())


def report(places: Sequence[Place | None], now: float, silent_seconds: float) -> str:
    """Task and ranks to blame: those that say nothing any more, else those that do not wait, else those behind."""
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
            lines.append(f"rank {rank} has never said where it is")
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
