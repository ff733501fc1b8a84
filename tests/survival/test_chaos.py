"""A run that is killed 20 times, at moments a seed draws, is the run that was left alone."""

import pytest
from chaos import POINTS, chaos


@pytest.mark.parametrize("layout", ["one", "ring"])
def test_killed_twenty_times(layout, corpus, tmp_path):
    deaths = chaos(layout, kills=20, seed=20, corpus=corpus, folder=tmp_path)
    assert deaths.total() == 20
    assert deaths.keys() == {*POINTS, "any time"}, "a moment that was not reached"
