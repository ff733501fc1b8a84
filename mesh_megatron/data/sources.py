"""Which files there are to read: files, globs, folders and standard input become a list in a fixed order."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Format = Literal["jsonl", "json", "text", "parquet", "arrow"]
FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".json": "json", ".txt": "text", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
STDIN = "-"


@dataclass(frozen=True)
class Source:
    """One input file; ``size`` in bytes on disk, 0 for standard input."""

    path: str
    format: Format
    compression: str = ""
    size: int = 0


def list_sources(
    inputs: Sequence[str], *, text_suffixes: Sequence[str] = (), stdin_format: Format = "jsonl"
) -> list[Source]:
    """Expand ``inputs`` in their order; within a glob or folder by name. A file that comes twice, by whatever
    path or link, is read once.

    Folders are searched at any depth for suffixes that are known or in ``text_suffixes`` (read as .txt); what starts
    with a dot is left out. What preprocessing wrote is left out of folders and globs. A folder that ``datasets`` saved
    is read as a Hugging Face dataset. ``ValueError`` for what is not there or has no known suffix.
    """
    known: dict[str, Format] = dict(FORMATS)
    known.update({"." + suffix.lstrip("."): "text" for suffix in text_suffixes})
    sources: dict[Path | str, Source] = {}
    for item in inputs:
        if item == STDIN:
            sources.setdefault(STDIN, Source(STDIN, stdin_format))
            continue
        for path in _files(item, known):
            sources.setdefault(path.resolve(), _source(path, known))
    return list(sources.values())


def _files(item: str, known: dict[str, Format]) -> list[Path]:
    path = Path(item)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_bytes()).get("splits", [])
            raise ValueError(f"--input {item} holds several splits: give {' or '.join(str(path / s) for s in splits)}")
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return _arrow_files(path)
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        hidden = [any(part.startswith(".") for part in file.relative_to(path).parts) for file in inside]
        files = [
            file
            for file, skip in zip(inside, hidden, strict=True)
            if not skip and suffixes_of(file)[0] in known and not _is_output(file, path)
        ]
        if not files:
            raise ValueError(f"--input {item}: no file in this folder ends in {', '.join(known)} (see --text-suffixes)")
        return files
    if path.is_file():
        return [path]
    found = [Path(name) for name in sorted(glob.glob(item, recursive=True))]
    found = [file for file in found if file.is_file() and not _is_output(file, path)]
    if not found:
        raise ValueError(f"--input {item}: no such file or folder, and nothing matches it")
    return found


def _is_output(file: Path, named: Path) -> bool:
    """Whether preprocessing wrote ``file``: into the PREFIX.partial of a run that goes on or was interrupted (unless
    ``named`` asks for this folder), or as the PREFIX.json of a .bin/.idx pair in the same folder."""
    folders = set(file.parent.parts) - set(named.parts)
    return any(folder.endswith(".partial") for folder in folders) or (
        file.suffix == ".json" and file.with_suffix(".idx").exists()
    )


def _arrow_files(folder: Path) -> list[Path]:
    state = json.loads((folder / "state.json").read_bytes())
    if state.get("_indices_files"):
        raise ValueError(f"--input {folder}: selects rows by an index; save it again after flatten_indices()")
    return [folder / entry["filename"] for entry in state["_data_files"]]


def suffixes_of(path: Path) -> tuple[str, str]:
    """(suffix of the format, suffix of the compression or nothing)"""
    if path.suffix in COMPRESSIONS:
        return Path(path.stem).suffix, path.suffix
    return path.suffix, ""


def _source(path: Path, known: dict[str, Format]) -> Source:
    suffix, compression = suffixes_of(path)
    if suffix == ".arrow":
        return Source(str(path), "arrow", compression, path.stat().st_size)
    if suffix not in known:
        raise ValueError(
            f"--input {path}: what is in a {suffix or 'file without suffix'}? Known are {', '.join(known)} (with or "
            f"without {', '.join(COMPRESSIONS)}); name others in --text-suffixes to read them as text"
        )
    return Source(str(path), known[suffix], compression, path.stat().st_size)
