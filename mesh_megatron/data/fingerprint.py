"""What tells one data set from another of the same name."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from mesh_megatron.config.data import DataConfig

_ENDS = 1 << 20


def data_files(data: DataConfig) -> dict[str, str]:
    """Every file that a run reads tokens from -> its fingerprint, or "missing" (text that is not preprocessed yet)."""
    prefixes = [prefix for prefixes in data.sources().values() for prefix in prefixes]
    return {f"{prefix}{end}": fingerprint(f"{prefix}{end}") for prefix in prefixes for end in (".idx", ".bin")}


def fingerprint(path: str) -> str:
    """Size and a hash of both ends: enough to tell another data set, and quick on a shared disk."""
    try:
        status = Path(path).stat()
    except OSError:
        return "missing"
    return f"{status.st_size} bytes ({_hash_of_ends(path, status.st_size, status.st_mtime_ns)})"


@functools.cache
def _hash_of_ends(path: str, size: int, changed: int) -> str:
    """Asked for by several parts of a run that starts, and read once; ``changed`` is when the file last was."""
    with Path(path).open("rb") as file:
        digest = hashlib.sha256(file.read(_ENDS))
        file.seek(max(size - _ENDS, 0))
        digest.update(file.read())
    return digest.hexdigest()[:16]
