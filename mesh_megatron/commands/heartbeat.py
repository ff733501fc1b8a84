"""Report the status of a run from its heartbeat.json. See docs/operations.md.

Exit code: 0 finished; 75 stopped early, the same command continues it; 1 failed; 2 refused, or no heartbeat; 3 failed
because numbers went wrong; 4 recorded as running: if its job has ended, the run was killed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from tyro.conf import Positional

from mesh_megatron.config.cli import parse, run
from mesh_megatron.training.fault_tolerance.run_status import (
    REFUSED_EXIT_CODE,
    STOPPED_EARLY_EXIT_CODE,
    RunStatus,
    read_status,
)

EXIT_CODES = {"finished": 0, "stopped early": STOPPED_EARLY_EXIT_CODE, "failed": 1, "starting": 4, "running": 4}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Report the status of a run."""

    save: Positional[Path]
    """Folder that the run's --save named."""


def main() -> int:
    args = parse(Arguments, description=__doc__)
    return run(lambda: report(args.save), (ValueError,))


def report(save: Path) -> int:
    """Print the status and return the exit code for it."""
    status = read_status(save)
    print(in_words(status))
    if status.refusal is not None and status.status != "finished":
        return REFUSED_EXIT_CODE
    return status.exit_code or EXIT_CODES[status.status]


def in_words(status: RunStatus) -> str:
    """Return the status as one readable line."""
    parts = [
        f"the newest start was refused ({status.refusal}); the run before it" if status.refusal else None,
        f"{status.status}{f' ({status.reason})' if status.reason else ''}",
        f"iteration {status.iteration}/{status.train_iters}",
        f"loss {status.loss:.4f}" if status.loss is not None else None,
        f"{status.tokens_per_second:,.0f} tokens/s" if status.tokens_per_second is not None else None,
        f"ETA {timedelta(seconds=status.eta_seconds)}" if status.eta_seconds is not None else None,
        f"last checkpoint {status.last_checkpoint or 'none'}",
        f"{status.world_size} ranks, rank 0 is process {status.pid} on {status.host}",
        f"written {timedelta(seconds=max(0, round(time.time() - status.time)))} ago",  # two machines' clocks differ
    ]
    return " | ".join(part for part in parts if part is not None)
