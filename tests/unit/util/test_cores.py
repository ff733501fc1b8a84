"""Cores that a process may use, with and without a container's share of them."""

import os
from pathlib import Path

import pytest

from mesh_megatron.util.cores import cores


@pytest.mark.parametrize(
    "share, expected",
    [
        ("200000 100000\n", 2),
        ("350000 100000\n", 3),
        ("50000 100000\n", 1),
        ("max 100000\n", 8),
        ("9900000 100000\n", 8),
    ],
)
def test_share_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    limit = tmp_path / "cpu.max"
    limit.write_text(share)
    assert cores(limit) == expected


def test_without_containers_and_affinities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert cores(tmp_path / "nothing") == 10
