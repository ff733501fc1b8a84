"""Where the time between the start of a rank and its first step goes."""

from __future__ import annotations

import time


class StartClock:
    """Seconds of each phase before the first step."""

    def __init__(self, started: float) -> None:
        """Begin with the phase in which ranks join; imports and checks of the settings, since ``started``, are over.

        ``started`` is a time of ``time.monotonic``.
        """
        self._entered = [("imports", started)]
        self.enter("joining the other ranks")

    def enter(self, phase: str) -> None:
        """Begin with ``phase``."""
        self._entered.append((phase, time.monotonic()))

    def report(self) -> str:
        """Return one line with the seconds of every phase until now."""
        times = [*(at for _, at in self._entered), time.monotonic()]
        parts = [f"{times[i + 1] - times[i]:.1f} {phase}" for i, (phase, _) in enumerate(self._entered)]
        return f"start             {times[-1] - times[0]:.1f} s: {', '.join(parts)}"
