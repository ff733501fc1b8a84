"""benchmarks/gradient_precision.py: the loss after the last step, and the table."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gradient_precision import last_loss, markdown


def test_a_run_counts_when_it_has_its_last_validation_loss(tmp_path: Path) -> None:
    assert last_loss(tmp_path, 4) is None
    records = [{"iteration": 2, "lm loss validation": 3.0}, {"iteration": 4, "lm loss": 2.5}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert last_loss(tmp_path, 4) is None
    path.write_text(path.read_text() + json.dumps({"iteration": 4, "lm loss validation": 2.75}) + "\n")
    assert last_loss(tmp_path, 4) == 2.75


def test_kinds_are_compared_inside_each_seed() -> None:
    lines = markdown({"float32": {1: 3.0, 2: 4.0}, "bfloat16": {1: 3.1, 2: 4.1}})
    assert lines[2:4] == ["| float32 | 1: 3.0000, 2: 4.0000 | 3.5000 |", "| bfloat16 | 1: 3.1000, 2: 4.1000 | 3.6000 |"]
    assert lines[-1].startswith("bfloat16 - float32: +0.1000")
