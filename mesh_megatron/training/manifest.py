"""What a checkpoint folder must hold: ``manifest.json``, written last, has the size and hash of every other file.

A folder that agrees with its manifest is whole; without one it is not. The hash (XXH3, 128 bits) finds accidents of
disks and networks, not forgeries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, TypedDict

import xxhash

from mesh_megatron.training.durable import write_durably

MANIFEST = "manifest.json"
Verification = Literal["size", "hash"]
_BLOCK = 1 << 22
_THREADS = 4  # reading and hashing both let other threads run


class FileRecord(TypedDict):
    """One file: bytes, and hexadecimal digits of its hash."""

    size: int
    xxh3_128: str


Files = dict[str, FileRecord]


def _ignore(count: int) -> None:
    pass


def describe(folder: Path, names: Iterable[str]) -> Files:
    """Size and hash of some files of ``folder``, by name."""
    records: Files = {}
    for name in names:
        path = folder / name
        records[name] = {"size": path.stat().st_size, "xxh3_128": hash_file(path)}
    return records


def hash_file(path: Path, progress: Callable[[int], object] = _ignore) -> str:
    """``progress`` is told how many bytes have been read since it was last called."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def write_manifest(folder: Path, files: Files) -> None:
    """Call it last: from now on the folder is whole."""
    write_durably(folder / MANIFEST, json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")


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


def find_damage(folder: Path, how: Verification = "size", progress: Callable[[int], object] = _ignore) -> list[str]:
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
