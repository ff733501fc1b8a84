from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from engine.ranks import SOURCE, EngineRanks, find_python
from rank_pool import RankPool
from training_runs import TrainingRecord, train

from mesh_megatron.config.run import RunConfig


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def engine_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRanks]:
    """Ranks whose layers may be Transformer Engine's, with torch's arithmetic (``tests/engine``)."""
    folder = find_python(tmp_path_factory.mktemp("engine"))
    if folder is None:
        pytest.skip(f"needs Transformer Engine's Python, from make env or a folder with its wheel: {SOURCE}=folder")
    with EngineRanks(folder) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def one_process(ranks: RankPool) -> Callable:
    """Return one process's results of a run; computed once per run."""
    known: dict[RunConfig, TrainingRecord] = {}

    def record(run: RunConfig) -> TrainingRecord:
        if run not in known:
            known[run] = ranks.run(1, train, run, True, True)[0]
        return known[run]

    return record
