"""Timers of the parts of steps, by Megatron-LM's names, which wait for a GPU only where they are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mesh_megatron.platform import device


class Timer:
    """Times one part, or nothing without a ``watch``; ``start`` and ``stop`` take Megatron-Core's arguments."""

    def __init__(self, watch: device.Stopwatch | None) -> None:
        self.watch = watch

    def start(self, barrier: bool = False) -> None:
        """Begin a span. ``barrier`` is ignored: ranks never wait for each other to be timed."""
        if self.watch is not None:
            self.watch.start()

    def stop(self, barrier: bool = False) -> None:
        """End the span."""
        if self.watch is not None:
            self.watch.stop()


_NOTHING = Timer(None)


class Timers:
    """Timers by name, up to a log level: 1 for what happens a few times per step, 2 for every micro-batch.

    Megatron-Core's schedules and optimizers call it as the ``timers`` of their configurations, and ``timed`` does here.
    """

    def __init__(self, level: int) -> None:
        self.level = level
        self._watches: dict[str, device.Stopwatch] = defaultdict(device.Stopwatch)
        self._above: set[str] = set()

    def __call__(self, name: str, log_level: int | None = None) -> Timer:
        """Return the timer ``name``; one that does nothing if its level, given at its first call, is above ours."""
        if log_level is not None and log_level > self.level:
            self._above.add(name)
        return _NOTHING if name in self._above else Timer(self._watches[name])

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call; waits for a GPU."""
        return {name: watch.take() for name, watch in self._watches.items()}


@contextmanager
def timed(config: Any, name: str, level: int) -> Iterator[None]:
    """Time the block with the timers of a Megatron-Core configuration, if it has any."""
    timers = config.timers
    if timers is not None:
        timers(name, log_level=level).start()
    yield
    if timers is not None:
        timers(name).stop()
