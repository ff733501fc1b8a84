"""A run that is killed at moments of the list, in an order a seed draws, is the run that was left alone."""

import pytest
from chaos import POINTS, chaos

MOMENTS = {*POINTS, "any time"}


@pytest.mark.long
@pytest.mark.parametrize("layout", ["one", "ring"])
def test_killed_at_every_moment(layout, corpus, tmp_path):
    deaths = chaos(layout, kills=len(MOMENTS), seed=20, corpus=corpus, folder=tmp_path)
    assert deaths.total() == len(MOMENTS)
    assert deaths.keys() == MOMENTS, "a moment that was not reached"


@pytest.mark.parametrize(("layout", "kills"), [("one", 3), pytest.param("ring", 6, marks=pytest.mark.full)])
def test_killed_at_some_moments(layout, kills, corpus, tmp_path):
    deaths = chaos(layout, kills, seed=20, corpus=corpus, folder=tmp_path)
    assert deaths.total() == kills and deaths.keys() <= MOMENTS
