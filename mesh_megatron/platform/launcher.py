"""torchrun as the parent of this process: what to do when this rank refuses to start, and when torchrun is killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator

from mesh_megatron.util.processes import die_with_parent

# The other ranks of a node refuse for the same reason as its first, after which torchrun ends them.
_SECONDS_TO_BE_ENDED = 15.0


def under_torchrun() -> bool:
    """Return whether torchrun started this process; it treats every exit code but 0 as a crash."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def number_in_environment(name: str, default: int, least: int = 0) -> int:
    """Return the number that the launcher has set as ``name``, ``default`` if it is not set or empty.

    Raises ``ValueError`` if it is no whole number of at least ``least``.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text} in the environment: must be a whole number of at least {least}; unset it")
    return int(text)


def place_in_job(alone: bool) -> tuple[int, int]:
    """Return this process's rank and the number of ranks, as the launcher has set them; without one 0 and 1.

    Raises ``ValueError`` if they are no such numbers, or if a number of ranks comes without a rank to a process that is
    not ``alone`` (which plans): as a single process it would train with settings made for several.
    """
    rank, ranks = number_in_environment("RANK", 0), number_in_environment("WORLD_SIZE", 1, least=1)
    if ranks > 1 and not os.environ.get("RANK") and not alone:
        raise ValueError(f"WORLD_SIZE={ranks} in the environment without RANK: start with torchrun, or unset it")
    if rank >= ranks:
        raise ValueError(f"RANK={rank} in the environment: must be below WORLD_SIZE={ranks}; start with torchrun")
    return rank, ranks


def end_with_launcher() -> None:
    """Let this process be killed when torchrun ends, so that no rank goes on and holds --save; on Linux only."""
    if under_torchrun():
        die_with_parent(os.getppid())


def report_refusal(message: str) -> None:
    """Print why this rank does not start, once for all ranks of a node.

    After a failed rank torchrun prints a traceback and then a report, which ends with the message that the rank left in
    its error file. A message printed before would be hidden by them.
    """
    if under_torchrun():
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # else torchrun reports it as a failure of its own
            time.sleep(_SECONDS_TO_BE_ENDED)
            message = f"rank {os.environ.get('RANK')}: {message}"
        elif _leave_for_report(message):
            return
    with contextlib.suppress(OSError):  # a full disk must not change the exit code
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()


def _leave_for_report(message: str) -> bool:
    """Write ``message`` where torchrun's report reads it; return whether there is such a place."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def refusals_reported() -> Iterator[None]:
    """Report what the block prints before it ends the program with an error, as ``report_refusal`` does.

    If it ends the program without an error, as --help does, only the first rank of a node prints.
    """
    if not under_torchrun():
        yield
        return
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            yield
    except SystemExit as stop:
        if stop.code not in (None, 0):
            report_refusal(errors.getvalue().strip())
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stdout.write(printed.getvalue())
        raise
    sys.stdout.write(printed.getvalue())
    sys.stderr.write(errors.getvalue())
