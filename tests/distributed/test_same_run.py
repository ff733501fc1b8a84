"""Ranks that start with other settings or data are found before they wait for each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cases import run_config
from rank_pool import RankPool

from mesh_megatron.config.run import RunConfig
from mesh_megatron.platform import device
from mesh_megatron.training.fault_tolerance.rank_consistency import check_rank_consistency, differing, facts_of


def complaint(run: RunConfig, odd: RunConfig) -> str | None:
    try:
        check_rank_consistency(odd if device.rank() == 1 else run)
    except ValueError as error:
        return str(error)
    return None


def test_another_setting_is_named_with_its_rank(ranks: RankPool) -> None:
    run = run_config()
    odd = dataclasses.replace(run, training=dataclasses.replace(run.training, lr=0.5))
    expected = "the ranks do not start the same run: --lr is 0.5 on rank 1 and 0.002 elsewhere"
    assert ranks.run(3, complaint, run, odd) == [expected] * 3
    assert ranks.run(2, complaint, run, run) == [None] * 2


def test_other_data_is_another_fact(tmp_path: Path) -> None:
    run = run_config()
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, mock_data=False, data_path=(f"{tmp_path}/a",)))
    (tmp_path / "a.idx").write_bytes(b"index")
    before = facts_of(run)
    (tmp_path / "a.idx").write_bytes(b"indey")
    [line] = differing([before, before, facts_of(run)])
    assert line.startswith(f"{tmp_path}/a.idx is 5 bytes (") and "on rank 2 and 5 bytes (" in line
    assert before[f"{tmp_path}/a.bin"] == "missing"
