"""``SAVE/owner.json``: one run at a time writes to a --save folder. Needs no torch.

While a run lasts the file is touched every few seconds; when it ends the file is removed. A run that starts
and finds one goes ahead at once where its owner is known to be gone; else it watches whether the file is still touched.
It looks for a change and not at the clock, because the clocks of two machines differ.
"""

from __future__ import annotations

import contextlib
import json
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

OWNER = "owner.json"
_TOUCH_SECONDS = 8.0
_WATCH_SECONDS = 25.0  # three times as long


class InUse(ValueError):
    """Another run writes to the folder."""


def _machine() -> str | None:
    """Within which a process id means one process: containers of one host have ids of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _birth(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: ids are used again. None if it has ended or cannot be seen."""
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
        """Whether this machine can see if the process lives."""
        return self.machine is not None and self.machine == _machine()

    def is_gone(self) -> bool:
        """Whether nothing of it is left for certain; SLURM starts a job again only when its processes have ended."""
        if self.is_here():
            return _birth(self.pid) != self.birth
        return self.job is not None and self.job == os.environ.get("SLURM_JOB_ID")

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" of SLURM job {self.job}" if self.job else "")


class _Sign(NamedTuple):
    """What the file says."""

    owner: Owner
    touched: int


def wait_until_free(save: Path) -> None:
    """Return once no other run writes to ``save``, at once if that can be known; ``InUse`` if one does."""
    first = found = _read(save)
    end = time.monotonic() + _WATCH_SECONDS
    while found is not None and not found.owner.is_gone():
        watched = time.monotonic() >= end
        if watched and found == first and not found.owner.is_here():
            return
        if watched or found != first:
            raise InUse(
                f"--save {save} is in use by another run, {found.owner}: wait for its end, end it, or name another "
                "folder"
            )
        time.sleep(0.5)
        found = _read(save)


def is_locked(save: Path) -> bool:
    """Whether another run writes to ``save``, or one that was killed on another machine has left it so."""
    try:
        found = _read(save)
    except OSError:  # no folder, or none that can be read
        return False
    return found is not None and not found.owner.is_gone()


@contextlib.contextmanager
def hold_save_lock(save: Path) -> Iterator[None]:
    """Within, ``save`` is this process's; ``InUse`` if it is another run's. A full disk stops nothing."""
    wait_until_free(save)
    owner = Owner()
    with contextlib.suppress(OSError):
        (save / OWNER).unlink(missing_ok=True)  # which is possible without room for a new one
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
    """In a process of its own: while Megatron-Core indexes data, no thread of this one may run for minutes."""
    arguments = [str(save), json.dumps(asdict(owner)), str(_TOUCH_SECONDS)]
    return subprocess.Popen(
        [sys.executable, "-m", "mesh_megatron.training.fault_tolerance.save_lock", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _hold(save: Path, owner: Owner, seconds: float) -> None:
    """Touch the file every few ``seconds``, as long as the owner lives, which has started this process."""
    die_with_parent(owner.pid)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # are for the owner to hear
        signal.signal(number, signal.SIG_IGN)
    while os.getppid() == owner.pid:
        with contextlib.suppress(OSError):  # of a disk that is full, or away for a while
            found = _read(save)
            if found is None:
                _write(save, owner)
            elif found.owner == owner:
                os.utime(save / OWNER)
            else:
                # This one stood still so long, as a machine may, that another run has taken its place.
                print(f"--save {save} now belongs to another run, {found.owner}: this one ends", file=sys.stderr)
                os.kill(owner.pid, signal.SIGKILL)
        time.sleep(seconds)


def _read(save: Path) -> _Sign | None:
    """None where there is no owner, or a file that is none of ours."""
    try:
        with (save / OWNER).open(encoding="utf-8") as file:  # opening asks a network's disk anew
            return _Sign(Owner(**json.load(file)), os.fstat(file.fileno()).st_mtime_ns)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write(save: Path, owner: Owner) -> None:
    write_atomically(save / OWNER, json.dumps(asdict(owner), indent=1) + "\n")


if __name__ == "__main__":
    _hold(Path(sys.argv[1]), Owner(**json.loads(sys.argv[2])), float(sys.argv[3]))
