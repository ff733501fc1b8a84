"""Files that are there when work ends: either old or new, never half written, and with a place to be written to."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``, once the text is on the disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def replace_when_complete(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``, with its suffix, that replaces ``path`` when the block succeeds."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    yield temporary
    os.replace(temporary, path)


def prepare_file(path: Path, flag: str) -> None:
    """Make the folder of what ``flag`` names, before the work whose result is written there; ``ValueError`` if not."""
    if path.is_dir():
        raise ValueError(f"{flag} {path}: is a folder; name a file")
    prepare_folder(path.parent, f"{flag} {path}")


def prepare_folder(folder: Path, named: str) -> None:
    """``prepare_file`` for any file in ``folder``; ``named`` is how flag and value are called in a refusal."""
    try:
        with contextlib.suppress(FileExistsError):  # a file in place of the folder: the next line says it better
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{named}: {folder} cannot be written to ({error.strerror}); name another place") from error
