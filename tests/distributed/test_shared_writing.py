"""Every data-parallel rank writes its share of a checkpoint."""

from pathlib import Path

import pytest
from cases import SMALLER, run_config
from rank_pool import RankPool
from training_runs import train_and_save

pytestmark = pytest.mark.full


@pytest.mark.parametrize("optimizer", ["", "--use-distributed-optimizer"])
def test_no_rank_writes_more_than_twice_its_share(ranks: RankPool, tmp_path: Path, optimizer: str) -> None:
    ranks.run(4, train_and_save, run_config(layout=f"--save {tmp_path} {SMALLER} {optimizer}"), 1)
    files = list((tmp_path / "iter_0000001").glob("*.distcp"))
    written = [sum(file.stat().st_size for file in files if file.name.startswith(f"__{rank}_")) for rank in range(4)]
    assert min(written) > 0 and max(written) < 2 * sum(written) / 4, written
