"""What figures call the runs and models that are drawn side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def names_of(folders: Sequence[Path]) -> list[str]:
    """One name a folder: its own, or where these are not different its path as given."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
