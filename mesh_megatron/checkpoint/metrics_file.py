"""The name and the reader of ``SAVE/metrics.jsonl``, which training writes beside its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records, oldest first, without a line that a crash or a full disk has cut off.

    Raises ``OSError`` if the file cannot be read.
    """
    lines = path.read_bytes().split(b"\n")
    return [record for line in lines if (record := parse_record(line)) is not None]


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record of one line; None if the line is empty, cut off, or not a record of an iteration."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("iteration"), int) else None
