"""The lock ``SAVE/owner.json``, by which only one run at a time writes to a --save folder. Needs no torch.

During a run the file is touched every few seconds; at its end the file is removed. A run that starts and finds the file
continues at once if the owner has certainly ended; otherwise it watches whether the file is still touched. It compares
the file's time with an earlier one and not with the clock, because the clocks of two machines differ.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from mesh_megatron.util.atomic_files import write_atomically
from mesh_megatron.util.processes import die_with_parent

logger = logging.getLogger(__name__)

OWNER = "owner.json"
_TOUCH_SECONDS = 8.0
_WATCH_SECONDS = 25.0  # three touches


class InUse(ValueError):
    """Another run writes to the folder."""


def _machine() -> str | None:
    """Return the scope of process ids: the boot of this host and its container's namespace; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _birth(pid: int) -> str | None:
    """Return the start time of a process in kernel ticks, because ids are reused; None if it has ended or is hidden."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that writes to the folder; by default this one."""

    run: str = field(default_factory=lambda: secrets.token_hex(8))
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    birth: str | None = field(default_factory=lambda: _birth(os.getpid()))
    machine: str | None = field(default_factory=_machine)
    job: str | None = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID"))

    def is_here(self) -> bool:
        """Return whether this machine can tell if the process is alive."""
        return self.machine is not None and self.machine == _machine()

    def is_gone(self) -> bool:
        """Return whether the process has certainly ended; SLURM requeues a job only after its processes have ended."""
        if self.is_here():
            return _birth(self.pid) != self.birth
        return self.job is not None and self.job == os.environ.get("SLURM_JOB_ID")

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" of SLURM job {self.job}" if self.job else "")


class _Lock(NamedTuple):
    """The content of the file and the time of its last touch."""

    owner: Owner
    touched: int
    """Modification time in ns."""


def wait_until_free(save: Path) -> None:
    """Return when no other run writes to ``save``, at once if that is certain; raise ``InUse`` if one does."""
    first = found = _read(save)
    end = time.monotonic() + _WATCH_SECONDS
    while found is not None and not found.owner.is_gone():
        watched = time.monotonic() >= end
        if watched and found == first and not found.owner.is_here():
            return
        if watched or found != first:
            raise InUse(
                f"--save {save} is in use by another run, {found.owner}: wait until it ends, end it, or give another "
                "folder"
            )
        time.sleep(0.5)
        found = _read(save)


def is_locked(save: Path) -> bool:
    """Return whether the file has an owner that may be alive; one killed on another machine cannot be recognised."""
    try:
        found = _read(save)
    except OSError:  # no folder, or not readable
        return False
    return found is not None and not found.owner.is_gone()


@contextlib.contextmanager
def hold_save_lock(save: Path) -> Iterator[None]:
    """Hold the lock on ``save`` inside the context; raise ``InUse`` if another run has it.

    A lock file that cannot be written, as on a full disk, does not stop the run.
    """
    wait_until_free(save)
    owner = Owner()
    with contextlib.suppress(OSError):
        (save / OWNER).unlink(missing_ok=True)  # possible even without space for a new one
        _write(save, owner)
    holder = _start_holding(save, owner)
    try:
        yield
    finally:
        holder.kill()
        holder.wait()
        with contextlib.suppress(OSError):
            if (found := _read(save)) is not None and found.owner == owner:
                (save / OWNER).unlink()


def _start_holding(save: Path, owner: Owner) -> subprocess.Popen[bytes]:
    """Start a process that holds the lock; threads here may not run for minutes while Megatron-Core indexes data."""
    arguments = [str(save), json.dumps(asdict(owner)), str(_TOUCH_SECONDS)]
    return subprocess.Popen(
        [sys.executable, "-m", "mesh_megatron.training.fault_tolerance.save_lock", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _hold(save: Path, owner: Owner, seconds: float) -> None:
    """Touch the file every ``seconds`` while the owner, the parent of this process, is alive."""
    die_with_parent(owner.pid)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # the owner handles them
        signal.signal(number, signal.SIG_IGN)
    while os.getppid() == owner.pid:
        with contextlib.suppress(OSError):  # the disk may be full or unavailable for a while
            found = _read(save)
            if found is None:
                _write(save, owner)
            elif found.owner == owner:
                os.utime(save / OWNER)
            else:
                # This machine was suspended for so long that another run has taken the lock.
                logger.warning(f"--save {save} now belongs to another run, {found.owner}: this one ends")
                os.kill(owner.pid, signal.SIGKILL)
        time.sleep(seconds)


def _read(save: Path) -> _Lock | None:
    """Return the lock; None if there is no file or it is not a lock file."""
    try:
        with (save / OWNER).open(encoding="utf-8") as file:  # opening refreshes a network file system's cache
            return _Lock(Owner(**json.load(file)), os.fstat(file.fileno()).st_mtime_ns)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write(save: Path, owner: Owner) -> None:
    write_atomically(save / OWNER, json.dumps(asdict(owner), indent=1) + "\n")


if __name__ == "__main__":
    _hold(Path(sys.argv[1]), Owner(**json.loads(sys.argv[2])), float(sys.argv[3]))
