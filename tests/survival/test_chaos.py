"""A run that is killed at chosen moments and restarted has the results of an uninterrupted run."""

import pytest
from chaos import POINTS, chaos

MOMENTS = {*POINTS, "any time"}


@pytest.mark.long
@pytest.mark.parametrize("layout", ["one", "ring"])
def test_killed_at_every_moment(layout, corpus, tmp_path):
    deaths = chaos(layout, kills=len(MOMENTS), seed=20, corpus=corpus, folder=tmp_path)
    assert deaths.total() == len(MOMENTS)
    assert deaths.keys() == MOMENTS, "some moments were not reached"


@pytest.mark.parametrize(("layout", "kills"), [("one", 3), pytest.param("ring", 6, marks=pytest.mark.long)])
def test_killed_at_some_moments(layout, kills, corpus, tmp_path):
    deaths = chaos(layout, kills, seed=20, corpus=corpus, folder=tmp_path)
    assert deaths.total() == kills and deaths.keys() <= MOMENTS
