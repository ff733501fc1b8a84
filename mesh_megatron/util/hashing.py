"""Hashes of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import xxhash

_BLOCK = 1 << 22


def ignore_progress(count: int) -> None:
    pass


def hash_file(path: Path, progress: Callable[[int], object] = ignore_progress) -> str:
    """Return the file's XXH3-128 hash in hex; call ``progress`` with the number of bytes of each block read."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        update_from(file, digest, progress)
    return digest.hexdigest()


def hash_file_64(path: Path) -> str:
    """Return the xxh3-64 of a file, hexadecimal: what PREFIX.json holds of a .bin."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        update_from(file, digest)
    return digest.hexdigest()


def update_from(
    file: BinaryIO, digest: xxhash.xxh3_64 | xxhash.xxh3_128, progress: Callable[[int], object] = ignore_progress
) -> None:
    """Add the rest of ``file`` to ``digest``, one block in memory at a time."""
    while block := file.read(_BLOCK):
        digest.update(block)
        progress(len(block))
