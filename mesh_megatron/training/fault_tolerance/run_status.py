"""The status of a run in ``SAVE/heartbeat.json``, for people and schedulers, and its exit codes. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, get_args

import psutil

HEARTBEAT = "heartbeat.json"
REFUSED_EXIT_CODE = 2
WRONG_NUMBERS_EXIT_CODE = 3
STOPPED_EARLY_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
Status = Literal["starting", "running", "finished", "stopped early", "failed"]


@dataclass(kw_only=True)
class RunStatus:
    """The content of the file. It is written after steps, so it does not change during evaluations or checkpoints."""

    status: Status = "starting"
    """After "stopped early" there is a checkpoint that the same command continues from."""
    reason: str | None = None
    """Why the run stopped early or failed."""
    exit_code: int | None = None
    """Exit code of a failed run, else None."""
    refusal: str | None = None
    """Why the newest start was refused; everything else is then the status of the run before it."""
    iteration: int = 0
    train_iters: int = 0
    consumed_tokens: int = 0
    loss: float | None = None
    """Loss of the newest step, in nats per token."""
    tokens_per_second: float | None = None
    """Speed of the steps since the file was last written, without evaluations and checkpoints between them."""
    eta_seconds: float | None = None
    """Seconds that the remaining steps will take at this speed."""
    last_checkpoint: str | None = None
    """Name of the newest checkpoint's folder in SAVE."""
    world_size: int = 1
    host: str = field(default_factory=socket.gethostname)
    """Host of rank 0; ``pid`` is its process."""
    pid: int = field(default_factory=os.getpid)
    time: float = 0.0
    """Unix time of writing; ``written`` is the same time as readable text in UTC."""
    written: str = ""


def write_status(folder: Path, status: RunStatus) -> None:
    """Replace the file atomically: readers see the old or the new one. Raises ``OSError`` if it cannot be written."""
    status.time = time.time()
    status.written = datetime.fromtimestamp(status.time, timezone.utc).isoformat(timespec="seconds")
    temporary = folder / f".{HEARTBEAT}.tmp"
    temporary.write_text(json.dumps(asdict(status), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / HEARTBEAT)


def note_refusal(folder: Path, reason: str) -> None:
    """Record that a run was refused at its start; the status of a run that the file already holds is kept."""
    before = None
    with contextlib.suppress(ValueError):  # no run has been there yet
        before = read_status(folder)
    with contextlib.suppress(OSError):  # no such folder, or not writable
        write_status(folder, refused(before, reason))


def refused(before: RunStatus | None, reason: str) -> RunStatus:
    """Return the status after a refused start: that of the run ``before`` with a note, or a failure if none began."""
    if before is None or before.exit_code == REFUSED_EXIT_CODE:
        return RunStatus(status="failed", reason=reason, exit_code=REFUSED_EXIT_CODE)
    return replace(before, refusal=reason)


def restarted_in_vain(folder: Path) -> str | None:
    """Return an error if this torchrun has restarted a run that ended with wrong numbers, which would recur; else None.

    The end of a run before this torchrun does not count. torchrun's own count of restarts is not reliable: if nodes end
    one after the other, torchrun restarts ranks without counting.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    with contextlib.suppress(ValueError, psutil.Error):
        status, launcher = read_status(folder), psutil.Process(os.getppid())
        if status.exit_code == WRONG_NUMBERS_EXIT_CODE and status.time > launcher.create_time():
            return f"not started again after {status.reason}"
    return None


def read_status(folder: Path) -> RunStatus:
    """Read the file; raise ``ValueError`` naming it if it is missing or damaged."""
    path = folder / HEARTBEAT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("status") not in get_args(Status):
            raise ValueError("it holds no status")
        return RunStatus(**{known.name: content[known.name] for known in fields(RunStatus) if known.name in content})
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: give the folder that a run's --save names") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
