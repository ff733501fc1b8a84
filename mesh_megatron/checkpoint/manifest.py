"""The manifest of a checkpoint folder: ``manifest.json``, written last, lists size and hash of every other file.

A folder that matches its manifest is intact; a folder without one is not. The hash (XXH3, 128 bits) detects accidental
corruption on disks and networks, not forgery.
"""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

from mesh_megatron.util.atomic_files import write_atomically
from mesh_megatron.util.hashing import hash_file, ignore_progress

MANIFEST = "manifest.json"
Verification = Literal["size", "hash"]
_THREADS = 4  # reading and hashing both release the GIL


class FileRecord(TypedDict):
    """One file: its size in bytes, and its hash in hexadecimal."""

    size: int
    xxh3_128: str


Files = dict[str, FileRecord]


def describe(folder: Path, names: Iterable[str]) -> Files:
    """Compute size and hash of the files ``names`` in ``folder``, by name."""
    records: Files = {}
    for name in names:
        path = folder / name
        records[name] = {"size": path.stat().st_size, "xxh3_128": hash_file(path)}
    return records


def write_manifest(folder: Path, files: Files) -> None:
    """Write the manifest; call it last, because it marks the folder as complete."""
    write_atomically(folder / MANIFEST, json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")


def seal(folder: Path) -> None:
    """Write a manifest of all files that are in ``folder`` now."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    write_manifest(folder, describe(folder, [name for name in names if name != MANIFEST]))


def read_manifest(folder: Path) -> Files:
    """Read the manifest's file records; ``ValueError`` if it is missing, unreadable or damaged."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: {"size": int(entry["size"]), "xxh3_128": str(entry["xxh3_128"])} for name, entry in files.items()}
    except FileNotFoundError as error:
        raise ValueError(f"{MANIFEST} is missing") from error
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged") from error


def find_damage(
    folder: Path, how: Verification = "size", progress: Callable[[int], object] = ignore_progress
) -> list[str]:
    """List the defects of a checkpoint, one line each; empty if it is intact.

    ``size`` compares every file's size. ``hash`` also reads every file; it calls ``progress`` with the number of bytes
    read since the last call.
    """
    if not folder.is_dir():
        return ["there is no such folder"]
    try:
        files = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    check = partial(_damage, folder, how=how, progress=progress)
    with ThreadPoolExecutor(_THREADS) as threads:
        return [damage for damage in threads.map(check, files, files.values()) if damage is not None]


def _damage(
    folder: Path, name: str, record: FileRecord, how: Verification, progress: Callable[[int], object]
) -> str | None:
    path = folder / name
    try:
        size = path.stat().st_size
        if size != record["size"]:
            return f"{name} has {size:,} bytes instead of {record['size']:,}"
        if how == "hash" and hash_file(path, progress) != record["xxh3_128"]:
            return f"{name} does not match its hash"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def write_and_record(write: Callable[..., None], folder: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """Write this rank's checkpoint files with ``write(*args)``, and their records for ``take_records`` beside them.

    Never raises, because all ranks synchronise afterwards: Megatron-Core reports its own failures, and records that
    cannot be written are missing. Garbage collection is off meanwhile: a fork must not free the rank's GPU objects.
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
    """Read and delete the records that ``write_and_record`` left; ``OSError`` if there are none."""
    path = _records(folder, rank)
    records = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return records


def _records(folder: Path, rank: int) -> Path:
    return folder / f".records_{rank}.json"
