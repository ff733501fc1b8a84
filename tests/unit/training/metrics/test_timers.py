"""Timers of the parts of steps: their levels, what they cost, and their line."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from mesh_megatron.platform import device
from mesh_megatron.training.callbacks.step_times import times_line
from mesh_megatron.training.metrics.timers import Timers, timed


def test_parts_above_the_level_are_not_timed() -> None:
    timers = Timers(1)
    for _ in range(2):
        timers("optimizer", log_level=1).start(barrier=True)  # one rank: a barrier would fail here
        timers("forward-compute", log_level=2).start()
        time.sleep(0.01)
        timers("forward-compute").stop()
        timers("optimizer").stop()
    times = timers.take()
    assert times.keys() == {"optimizer"}
    assert 0.02 <= times["optimizer"] < 1
    assert timers.take() == {"optimizer": 0}


def test_a_configuration_without_timers_is_not_timed() -> None:
    with timed(SimpleNamespace(timers=None), "optimizer", 1):
        pass


def test_a_stopwatch_frees_what_it_has_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has an event at both ends of every span; those that it has not passed yet stay."""
    passed = SimpleNamespace(now=0, made=0)

    class Event:
        def __init__(self) -> None:
            passed.made += 1
            self.number = passed.made

        def query(self) -> bool:
            return self.number <= passed.now

        def elapsed_time(self, end: Event) -> float:
            assert end.query(), "reading it would wait"
            return 1000.0

    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device.Stopwatch, "_now", staticmethod(Event))
    monkeypatch.setattr(device.torch.cuda, "synchronize", lambda: setattr(passed, "now", passed.made))
    watch = device.Stopwatch()
    longest = 0
    for number in range(5000):
        passed.now = passed.made - 1000 if number < 4000 else passed.now  # then the GPU stands still
        watch.start()
        watch.stop()
        longest = max(longest, len(watch._spans)) if number < 4000 else longest
    assert longest <= 2000
    assert watch.take() == 5000


@pytest.mark.parametrize(
    "option, text",
    [
        ("max", "max time across ranks (ms per step) | optimizer 2.00 | forward-recv 5.00"),
        ("minmax", "(min, max) time across ranks (ms per step) | optimizer (1.00, 2.00) | forward-recv (5.00, 5.00)"),
        ("all", "time of every rank (ms per step) | optimizer 1.00 2.00 | forward-recv 5.00"),
    ],
)
def test_the_line(option: str, text: str) -> None:
    ranks = [{"optimizer": 0.001}, {"optimizer": 0.002, "forward-recv": 0.005}]
    assert times_line(ranks, option) == text
