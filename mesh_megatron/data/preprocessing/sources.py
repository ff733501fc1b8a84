"""List the input files: files, globs, folders and standard input become a list in a fixed order."""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Format = Literal["jsonl", "json", "text", "parquet", "arrow"]
FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "text",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
STDIN = "-"


@dataclass(frozen=True)
class Source:
    """One input file; ``size`` in bytes on disk, 0 for standard input; ``content`` is a hash of it, where known."""

    path: str
    format: Format
    compression: str = ""
    size: int = 0
    content: str = ""

    def identity(self) -> bytes:
        """Return what distinguishes this input from others: its content hash if known, else its path, size and times.
        (The kernel sets the change time at every change, whatever a program does.)"""
        if self.content or self.path == STDIN:
            return f"{self.format}\0{self.compression}\0{self.content}\n".encode()
        status = os.stat(self.path)
        changed = f"\0{self.format}\0{self.size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\n"
        return os.fsencode(self.path) + changed.encode()


def list_sources(
    inputs: Sequence[str],
    *,
    text_suffixes: Sequence[str] = (),
    stdin_format: Format = "jsonl",
    passed_over: Counter[str] | None = None,
) -> list[Source]:
    """Expand ``inputs`` in the given order, a glob or folder by name. A file that is listed twice, by any path or
    link, is read once.

    Folders are searched at any depth, through links too, for suffixes that are known or in ``text_suffixes`` (read as
    .txt), in upper or lower case. Names that start with a dot and files that preprocessing wrote are skipped.
    ``passed_over`` counts skipped files by kind. A folder that ``datasets`` saved is read as a Hugging Face dataset.
    ``ValueError`` for a missing input or an unknown suffix.
    """
    known: dict[str, Format] = dict(FORMATS)
    known.update({"." + suffix.lstrip(".").lower(): "text" for suffix in text_suffixes})
    passed_over = Counter() if passed_over is None else passed_over
    sources: dict[Path | str, Source] = {}
    for item in inputs:
        if item == STDIN:
            sources.setdefault(STDIN, Source(STDIN, stdin_format))
            continue
        for path in _files(item, known, passed_over):
            sources.setdefault(path.resolve(), _source(path, known))
    return list(sources.values())


def told(passed_over: Counter[str]) -> str:
    """Return the skipped files as text, empty if there are none."""
    return ", ".join(f"{count:,} x {kind}" for kind, count in sorted(passed_over.items()))


def _files(item: str, known: dict[str, Format], passed_over: Counter[str]) -> list[Path]:
    if not item:
        raise ValueError("--input '': is empty; name a file, a folder or a glob")
    path = Path(item)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = _description(path / "dataset_dict.json").get("splits", [])
            raise ValueError(f"--input {item} holds several splits: give {' or '.join(str(path / s) for s in splits)}")
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return _arrow_files(path)
        found = _chosen(_below(path), path, passed_over, known)
        if not found:
            raise ValueError(
                f"--input {item}: no file in this folder ends in {', '.join(known)} (see --text-suffixes); it holds "
                f"{told(passed_over) or 'nothing'}"
            )
        return found
    if path.is_file():
        return [path]
    matching = set(_matches(item))
    if not matching:
        raise ValueError(f"--input {item}: no such file or folder, and nothing matches it")
    here: Counter[str] = Counter()
    found = _chosen(matching, path, here)
    passed_over.update(here)
    if not found:
        fixes = {"folder": "; name the folder by itself", "no regular file": "; read a pipe by --input -"}
        fix = "".join(words for kind, words in fixes.items() if here[kind])
        raise ValueError(f"--input {item}: no file to read there, only {told(here)}{fix}")
    return found


def _chosen(
    files: Iterable[Path], named: Path, passed_over: Counter[str], known: dict[str, Format] | None = None
) -> list[Path]:
    """Return those of ``files`` that are read, sorted by name; ``known`` are the suffixes to read, None reads all."""
    chosen = []
    for file in sorted(files):
        kind = _why_not(file, named, known)
        if kind is None:
            chosen.append(file)
        else:
            passed_over[kind] += 1
    return chosen


def _why_not(file: Path, named: Path, known: dict[str, Format] | None) -> str | None:
    """Return why a file is not read, as the kind counted; None if it is read."""
    if known is not None and file.name.startswith("."):
        return "hidden"
    if not file.is_file():
        return "folder" if file.is_dir() else "broken link" if file.is_symlink() else "no regular file"
    if _is_output(file, named):
        return "output of preprocessing"
    suffix, _ = suffixes_of(file)
    return None if known is None or suffix in known else suffix or "without suffix"


def _below(top: Path) -> Iterator[Path]:
    """Yield the files in ``top`` and its subfolders; a hidden folder is yielded itself instead of its files."""
    for folder in _folders(top):
        yield from (path for path in folder.iterdir() if path.name.startswith(".") or not path.is_dir())


def _folders(top: Path) -> Iterator[Path]:
    """Yield ``top`` and its subfolders that are not hidden, each once however many links lead there, and under its own
    path if that is below ``top``."""
    seen: set[Path] = set()
    own, linked = [top], deque[Path]()
    while own or linked:
        folder = own.pop() if own else linked.popleft()
        if (real := folder.resolve()) in seen:
            continue
        seen.add(real)
        yield folder
        for path in sorted(folder.iterdir()):
            if not path.name.startswith(".") and path.is_dir():
                (linked if path.is_symlink() else own).append(path)


def _matches(pattern: str) -> Iterator[Path]:
    """Match like ``glob.glob`` with ``recursive``, but without following circular links for hours."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))
        return
    at = parts.index("**")
    before = "/".join(parts[:at]) or "/" * at or "."
    after = "/".join(itertools.dropwhile("**".__eq__, parts[at:])) or "*"
    for top in map(Path, glob.glob(before)):
        for folder in _folders(top) if top.is_dir() else ():
            found = _matches(os.path.join(glob.escape(str(folder)), after))
            yield from (path for path in found if after != "*" or not path.is_dir())  # a folder's files match as well


def _is_output(file: Path, named: Path) -> bool:
    """Return whether preprocessing wrote ``file``: into the PREFIX.partial of a running or interrupted run (unless
    ``named`` is in that folder), or as the PREFIX.json of a .bin/.idx pair in the same folder."""
    folders = set(file.parent.parts) - set(named.parts)
    return any(folder.endswith(".partial") for folder in folders) or (
        file.suffix == ".json" and file.with_suffix(".idx").exists()
    )


def _arrow_files(folder: Path) -> list[Path]:
    state = _description(folder / "state.json")
    if state.get("_indices_files"):
        raise ValueError(f"--input {folder}: selects rows by an index; save it again after flatten_indices()")
    try:
        return [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"--input {folder}: its state.json lists no data files; save the dataset again") from error


def _description(path: Path) -> dict[str, Any]:
    """Read a JSON file that ``datasets`` saved; ``ValueError`` if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"--input {path.parent}: its {path.name} is damaged; save the dataset again")
    return content


def suffixes_of(path: Path) -> tuple[str, str]:
    """Return (suffix of the format, suffix of the compression or ""), in lower case."""
    if path.suffix.lower() in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), path.suffix.lower()
    return path.suffix.lower(), ""


def _source(path: Path, known: dict[str, Format]) -> Source:
    suffix, compression = suffixes_of(path)
    if suffix == ".arrow":
        return Source(str(path), "arrow", compression, path.stat().st_size)
    if suffix not in known:
        raise ValueError(
            f"--input {path}: unknown suffix {suffix or '(none)'}; known are {', '.join(known)} (with or "
            f"without {', '.join(COMPRESSIONS)}); name others in --text-suffixes to read them as text"
        )
    return Source(str(path), known[suffix], compression, path.stat().st_size)
