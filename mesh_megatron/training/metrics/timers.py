"""Timers of the parts of steps, by Megatron-LM's names, which wait for a GPU only where they are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mesh_megatron.platform import device


class Timer:
    """Times one part; ``start`` and ``stop`` take the arguments of Megatron-Core's timers."""

    def __init__(self) -> None:
        self.watch = device.Stopwatch()

    def start(self, barrier: bool = False) -> None:
        """Begin a span. ``barrier`` is ignored: ranks never wait for each other to be timed."""
        self.watch.start()

    def stop(self, barrier: bool = False) -> None:
        """End the span."""
        self.watch.stop()


class _NoTimer(Timer):
    def __init__(self) -> None:
        pass

    def start(self, barrier: bool = False) -> None:
        pass

    def stop(self, barrier: bool = False) -> None:
        pass


class Timers:
    """Timers by name, up to a log level: 1 for what happens a few times per step, 2 for every micro-batch.

    Megatron-Core's schedules and optimizers call it as the ``timers`` of their configurations, and ``timed`` does here.
    """

    def __init__(self, level: int) -> None:
        self.level = level
        self._timers: dict[str, Timer] = defaultdict(Timer)
        self._above: set[str] = set()

    def __call__(self, name: str, log_level: int | None = None) -> Timer:
        """Return the timer ``name``; one that does nothing if its level, given at its first call, is above ours."""
        if log_level is not None and log_level > self.level:
            self._above.add(name)
        return _NoTimer() if name in self._above else self._timers[name]

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call; waits for a GPU."""
        return {name: timer.watch.take() for name, timer in self._timers.items()}


@contextmanager
def timed(config: Any, name: str, level: int) -> Iterator[None]:
    """Time the block with the timers of a Megatron-Core configuration, if it has any."""
    timers = config.timers
    if timers is not None:
        timers(name, log_level=level).start()
    yield
    if timers is not None:
        timers(name).stop()
