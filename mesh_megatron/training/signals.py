"""Signals that ask a run to stop: remembered, and acted on between two steps."""

from __future__ import annotations

import signal
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class SignalListener:
    """Remembers the first of SIGTERM, SIGINT and SIGUSR1 (SLURM's early warning) that this process receives."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before = {number: signal.signal(number, self._remember) for number in STOPPING}

    def close(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
