"""Compute fingerprints of data files, which differ for different data under the same name."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable

import xxhash

from mesh_megatron.config.data import DataConfig, is_text
from mesh_megatron.data.check import read_description

BLOCK = 1 << 20
SPREAD = 64  # blocks of a longer .bin that are hashed


def data_files(data: DataConfig) -> dict[str, str]:
    """Return the fingerprint (or "missing") of every file that a run reads tokens or text from."""
    files: dict[str, str] = {}
    for path in (path for paths in data.sources().values() for path in paths):
        if is_text(path):
            files[path] = content(path)
        else:
            files |= {f"{path}.idx": content(f"{path}.idx"), f"{path}.bin": _tokens(path)}
    return files


def content(path: str) -> str:
    """Return size and hash of a complete file: equal for equal content only."""
    return _hashed(path)


def _tokens(prefix: str) -> str:
    """Return ``content`` of a .bin of up to ``SPREAD`` blocks. Hashing a longer one would take minutes: its hash is of
    evenly spread blocks and of the checksum in PREFIX.json."""
    return _hashed(f"{prefix}.bin", SPREAD, str(read_description(prefix).get("bin_xxh3_64", "")))


def _hashed(path: str, most: int | None = None, note: str = "") -> str:
    try:
        status = os.stat(path)
    except OSError:
        return "missing"
    size, blocks = status.st_size, -(-status.st_size // BLOCK)
    if most is None or blocks <= most:
        most, note = blocks, ""
    version = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return f"{size} bytes ({_hash(path, size, most, note, version)})"


@functools.cache
def _hash(path: str, size: int, most: int, note: str, version: tuple[int, ...]) -> str:
    """Hash a file once, though a starting run needs the hash in several places; ``version`` changes with the file."""
    digest = xxhash.xxh3_128(note.encode())
    with open(path, "rb") as file:
        for start in _starts(size, most):
            file.seek(start)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _starts(size: int, most: int) -> Iterable[int]:
    """Return where ``most`` blocks of a file start: all blocks if these are all, else evenly spread ones."""
    if most * BLOCK >= size:
        return range(0, size, BLOCK)
    return ((size - BLOCK) * number // (most - 1) for number in range(most))
