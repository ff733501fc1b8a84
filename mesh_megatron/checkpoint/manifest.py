"""What a checkpoint folder must hold: ``manifest.json``, written last, has the size and hash of every other file.

A folder that agrees with its manifest is whole; without one it is not. The hash (XXH3, 128 bits) finds accidents of
disks and networks, not forgeries.
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
_THREADS = 4  # reading and hashing both let other threads run


class FileRecord(TypedDict):
    """One file: bytes, and hexadecimal digits of its hash."""

    size: int
    xxh3_128: str


Files = dict[str, FileRecord]


def describe(folder: Path, names: Iterable[str]) -> Files:
    """Size and hash of some files of ``folder``, by name."""
    records: Files = {}
    for name in names:
        path = folder / name
        records[name] = {"size": path.stat().st_size, "xxh3_128": hash_file(path)}
    return records


def write_manifest(folder: Path, files: Files) -> None:
    """Call it last: from now on the folder is whole."""
    write_atomically(folder / MANIFEST, json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")


def seal(folder: Path) -> None:
    """Write the manifest of the files that are there."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    write_manifest(folder, describe(folder, [name for name in names if name != MANIFEST]))


def read_manifest(folder: Path) -> Files:
    """The records of a folder's files; ``ValueError`` where they cannot be read."""
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
    """What is wrong with a checkpoint, a line each; empty if it is whole.

    ``size`` looks at every file's size, ``hash`` reads every file as well, telling ``progress`` the bytes.
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
            return f"{name} holds other bytes than were written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


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
