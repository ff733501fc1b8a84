"""Hashes of the files that a rank writes, made by the process that writes them: training does not wait for them."""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesh_megatron.training.manifest import Files, describe


def write_and_record(write: Callable[..., None], folder: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """``write(*args)`` this rank's files of a checkpoint, and beside them their records for ``take_records``.

    Never raises: ranks meet after it. Megatron-Core reports its own failures; records that fail are missing. What the
    process has of the rank's garbage stays: some of it may belong to a GPU, of which a fork must not free anything.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        write(*args, **kwargs)
        records = describe(folder, [path.name for path in folder.glob(f"__{rank}_*.distcp")])
        _records(folder, rank).write_text(json.dumps(records), encoding="utf-8")
    except Exception:
        traceback.print_exc()
    finally:
        if collects:  # without --async-save it is no fork
            gc.enable()


def take_records(folder: Path, rank: int) -> Files:
    """What ``write_and_record`` left, which is removed; ``OSError`` if there is nothing."""
    path = _records(folder, rank)
    records = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return records


def _records(folder: Path, rank: int) -> Path:
    return folder / f".records_{rank}.json"
