"""A run that is killed at every moment of the list, in an order a seed draws, is the run that was left alone."""

import pytest
from chaos import POINTS, chaos


@pytest.mark.parametrize("layout", [pytest.param("one", marks=pytest.mark.long), "ring"])
def test_killed_at_every_moment(layout, corpus, tmp_path):
    moments = {*POINTS, "any time"}
    deaths = chaos(layout, kills=len(moments), seed=20, corpus=corpus, folder=tmp_path)
    assert deaths.total() == len(moments)
    assert deaths.keys() == moments, "a moment that was not reached"
