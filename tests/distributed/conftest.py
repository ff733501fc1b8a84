from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from rank_pool import RankPool
from training_runs import TrainingRecord, train

from mesh_megatron.config.run import RunConfig


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def one_process(ranks: RankPool) -> Callable:
    """Return one process's results of a run; computed once per run."""
    known: dict[RunConfig, TrainingRecord] = {}

    def record(run: RunConfig) -> TrainingRecord:
        if run not in known:
            known[run] = ranks.run(1, train, run, True, True)[0]
        return known[run]

    return record
