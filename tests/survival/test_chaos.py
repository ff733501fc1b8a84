"""A run that is killed 20 times, at moments a seed draws, is the run that was left alone."""

import os

import pytest
from chaos import chaos


@pytest.mark.parametrize("layout", ["one", "ring"])
def test_killed_twenty_times(layout, corpus, tmp_path):
    if "TEST_CHAOS" not in os.environ:
        pytest.skip("takes minutes: make chaos, or TEST_CHAOS=1")
    deaths = chaos(layout, kills=20, seed=20, corpus=corpus, folder=tmp_path)
    assert deaths.total() == 20
