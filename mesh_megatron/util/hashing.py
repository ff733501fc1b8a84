"""Hashes of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import xxhash

_BLOCK = 1 << 22


def ignore_progress(count: int) -> None:
    pass


def hash_file(path: Path, progress: Callable[[int], object] = ignore_progress) -> str:
    """Return the file's XXH3-128 hash in hex; call ``progress`` with the number of bytes of each block read."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()
