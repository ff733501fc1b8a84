"""``SAVE/heartbeat.json``: where a run stands, for people and schedulers. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import psutil

HEARTBEAT = "heartbeat.json"
REFUSED_EXIT_CODE = 2
WRONG_NUMBERS_EXIT_CODE = 3
STOPPED_EARLY_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
Status = Literal["starting", "running", "finished", "stopped early", "failed"]


@dataclass(kw_only=True)
class RunStatus:
    """What the file says. It is written after a step, so an evaluation or a checkpoint leaves it as it was."""

    status: Status = "starting"
    """"stopped early" has left a checkpoint that the same command continues from; "failed" says why in ``reason``."""
    reason: str | None = None
    """Why it stopped early or failed."""
    exit_code: int | None = None
    """Of a run that failed."""
    iteration: int = 0
    train_iters: int = 0
    consumed_tokens: int = 0
    loss: float | None = None
    """Of the newest step, in nats a token."""
    tokens_per_second: float | None = None
    """Of the steps since the file was written before; evaluations and checkpoints between them do not count."""
    eta_seconds: float | None = None
    """What the steps that are left will take at this speed."""
    last_checkpoint: str | None = None
    """Name of the folder in SAVE to continue from."""
    world_size: int = 1
    host: str = field(default_factory=socket.gethostname)
    """Of rank 0, as is ``pid``."""
    pid: int = field(default_factory=os.getpid)
    time: float = 0.0
    """Unix time of writing; ``written`` is the same for people, in UTC."""
    written: str = ""


def write_status(folder: Path, status: RunStatus) -> None:
    """Replace the file; readers see the old one or the new one. ``OSError`` if that cannot be."""
    status.time = time.time()
    status.written = datetime.fromtimestamp(status.time, timezone.utc).isoformat(timespec="seconds")
    temporary = folder / f".{HEARTBEAT}.tmp"
    temporary.write_text(json.dumps(asdict(status), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / HEARTBEAT)


def note_refusal(folder: Path, reason: str) -> None:
    """A run was started and refused: where it stood may be known, but the same command will not continue it."""
    try:
        status = read_status(folder)
    except ValueError:  # nothing has run there yet
        status = RunStatus()
    status.status, status.reason, status.exit_code = "failed", reason, REFUSED_EXIT_CODE
    status.eta_seconds = None
    with contextlib.suppress(OSError):  # there is no such folder, or nothing can be written
        write_status(folder, status)


def restarted_in_vain(folder: Path) -> str | None:
    """What is wrong if torchrun has started a run again whose numbers went wrong: they would do so again.

    What a run before this torchrun came to does not count. torchrun's own count of restarts would not tell: where nodes
    end one after the other, it starts ranks again without counting.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    with contextlib.suppress(ValueError, psutil.Error):
        status, launcher = read_status(folder), psutil.Process(os.getppid())
        if status.exit_code == WRONG_NUMBERS_EXIT_CODE and status.time > launcher.create_time():
            return f"not started again after {status.reason}"
    return None


def read_status(folder: Path) -> RunStatus:
    """``ValueError`` naming the file where there is none or it is damaged."""
    path = folder / HEARTBEAT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return RunStatus(**{known.name: content[known.name] for known in fields(RunStatus) if known.name in content})
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: give the folder that a run's --save names") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
