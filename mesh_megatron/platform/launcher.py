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
