"""Atomic file replacement, and early checks that an output can be written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file ``path`` by ``content`` (text as UTF-8) atomically: readers see the old or the new file."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def replace_when_complete(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``, with its suffix: it replaces ``path`` if the block succeeds, else it is
    deleted."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_to_others(path: Path) -> None:
    """Give ``path`` the mode that ``open`` gives a new file; some libraries make files that only their owner reads."""
    mask = os.umask(0)  # the only way to read it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def prepare_file(path: Path, flag: str) -> None:
    """Create the folder of the file that ``flag`` names; raise ``ValueError`` if it cannot be written to."""
    if path.is_dir():
        raise ValueError(f"{flag} {path}: is a folder; name a file")
    prepare_folder(path.parent, f"{flag} {path}")


def prepare_folder(folder: Path, named: str) -> None:
    """Create ``folder``; raise ``ValueError`` starting with ``named`` (flag and value) if it cannot be written to."""
    try:
        with contextlib.suppress(FileExistsError):  # a file in place of the folder: the next line says it better
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{named}: {folder} cannot be written to ({error.strerror}); name another place") from error
