"""Golden losses: a change that means to keep the mathematics keeps these curves.

``tests/golden/NAME.txt`` holds "step loss" lines of one process in float32. After a change that is meant to move them::

    python tests/distributed/update_golden.py --write
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cases import GOLDEN_MODELS, golden_file, run_config


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_losses_are_the_golden_ones(name: str, one_process: Callable) -> None:
    steps, losses = np.loadtxt(golden_file(name)).T
    record = one_process(run_config(GOLDEN_MODELS[name]))
    np.testing.assert_array_equal(steps, range(1, len(record.losses) + 1))
    np.testing.assert_allclose(record.losses, losses, rtol=0, atol=1e-5)
