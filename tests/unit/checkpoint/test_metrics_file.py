"""metrics.jsonl has one reader, which leaves out lines that were cut off."""

from __future__ import annotations

from pathlib import Path

from mesh_megatron.analysis.curves import read_curves
from mesh_megatron.checkpoint.metrics_file import read_metrics
from mesh_megatron.hf.model_card import _losses
from mesh_megatron.training.metrics.writer import keep_until

FIRST, SECOND = '{"iteration": 1, "lm loss": 5.0}', '{"iteration": 2, "lm loss": 4.0}'
CUT_OFF = '{"iteration": 2, "note": {"a": 1}'  # ends like a complete record


def test_every_reader_leaves_out_lines_that_were_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f"{FIRST}\n{CUT_OFF}\n{SECOND}\n{CUT_OFF}")
    assert [record["iteration"] for record in read_metrics(file)] == [1, 2]
    assert read_curves(file) == {"lm loss": ([1, 2], [5.0, 4.0])}
    assert _losses(file, 2) == {"lm loss": "4.0000"}


def test_a_multi_byte_character_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(FIRST.encode() + b'\n{"iteration": 2, "event": "\xe2\x80')
    assert [record["iteration"] for record in read_metrics(file)] == [1]


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    """Such as a note that someone has written into the file, or what a crash of the file system left."""
    file = tmp_path / "metrics.jsonl"
    others = ['{"note": "restarted"}', "null", "3", "[1]", '"x"', '{"iteration": "1"}', "\0\0\0"]
    file.write_text("\n".join([FIRST, *others, SECOND, ""]))
    assert [record["iteration"] for record in read_metrics(file)] == [1, 2]
    assert read_curves(file) == {"lm loss": ([1, 2], [5.0, 4.0])}
    keep_until(file, 1)
    assert file.read_text() == f"{FIRST}\n"
