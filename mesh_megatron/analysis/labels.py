"""Names in figures for runs and models that are drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return one name per folder: the folder's own name, or the paths as given if these names are not unique."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
