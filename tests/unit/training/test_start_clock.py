"""The line that tells where the time of a start went."""

import re

from mesh_megatron.training import start_clock
from mesh_megatron.training.start_clock import StartClock


def test_phases_add_up_to_the_time_since_the_start(monkeypatch):
    times = iter([104.0, 105.5, 105.75, 108.0])
    monkeypatch.setattr(start_clock.time, "monotonic", lambda: next(times))
    clock = StartClock(started=100.0)
    clock.enter("indexing data")
    clock.enter("building the model")
    line = clock.report()
    assert re.sub(" +", " ", line) == (
        "start 8.0 s: 4.0 imports, 1.5 joining the other ranks, 0.2 indexing data, 2.2 building the model"
    )
