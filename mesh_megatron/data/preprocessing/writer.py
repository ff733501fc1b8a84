"""Write preprocessed tokens: first to a growing folder PREFIX.partial, then renamed to the finished .bin/.idx.

Per key the folder holds the tokens and the lengths of sequences and documents so far, and ``journal.jsonl``, whose last
line records how much of them is valid and which block of which source comes next. So a killed run resumes from there,
only one block is ever in memory, and no .idx exists before everything else is on disk.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from mesh_megatron.data.indexed import write_index
from mesh_megatron.util.atomic_files import write_atomically
from mesh_megatron.util.hashing import update_from

_PARTS = ("tokens", "lengths", "counts")
_SIZE = np.dtype("<i4")


@dataclass
class Progress:
    """The progress of a run, as one line of the journal holds it."""

    source: int = 0
    """Number of the current source; ``block`` and ``line`` count what is done of it."""
    block: int = 0
    line: int = 0
    documents: int = 0
    by_gigatoken: int = 0
    """Documents tokenized by gigatoken; the vendor's library tokenized the others."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of each key."""
    empty: int = 0
    """Documents without tokens."""
    problems: dict[str, int] = field(default_factory=dict)
    """Skipped documents of each kind of problem."""
    examples: list[str] = field(default_factory=list)
    """Messages of the first problems."""
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Valid bytes of each part of each key."""


class DatasetWriter:
    """The output files of one run: ``targets`` maps keys to finished prefixes. ``open`` locks the prefix."""

    def __init__(self, prefix: str, targets: dict[str, str], dtype: np.dtype, plan: dict[str, Any]) -> None:
        self.prefix, self.targets, self.keys = prefix, targets, list(targets)
        self.dtype, self.plan = dtype, json.loads(json.dumps(plan))
        self.folder = Path(prefix + ".partial")
        self.progress = Progress(tokens=dict.fromkeys(targets, 0))
        self.files: dict[tuple[str, str], IO[bytes]] = {}
        self.digests = {key: xxhash.xxh3_64() for key in targets}
        self.whole = True

    def target(self, key: str, suffix: str) -> Path:
        return Path(self.targets[key] + suffix)

    def finished(self) -> bool:
        """Return whether the prefix already holds what this plan would write."""
        return all(map(self._is_finished, self.keys))

    def _is_finished(self, key: str) -> bool:
        try:
            description = json.loads(self.target(key, ".json").read_bytes())
        except (OSError, ValueError):
            return False
        exists = self.target(key, ".idx").is_file() and self.target(key, ".bin").is_file()
        return exists and isinstance(description, dict) and description.get("plan") == self.plan

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Lock the prefix; ``resume`` continues after the last journal line. ``ValueError`` if another run has it."""
        for key in self.keys:
            # A run of several keys that is killed while it moves its files has finished some of them.
            in_the_way = self.target(key, ".idx").exists() and not (resume and self._is_finished(key))
            if in_the_way and not overwrite:
                raise ValueError(
                    f"{self.target(key, '.idx')} exists: give another --output-prefix, or --overwrite to replace it"
                )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "a")  # noqa: SIM115 (held until the run ends)
        except OSError as error:
            raise ValueError(f"--output-prefix {self.prefix}: {error.strerror}") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise ValueError(f"--output-prefix {self.prefix}: another run is writing it; wait for it to end") from None
        known = self._read_journal() if resume else None
        if known is not None and self._holds(known):
            self.progress = known
        else:
            (self.folder / "journal.jsonl").unlink(missing_ok=True)
            (self.folder / "plan.json").write_text(json.dumps(self.plan))
        for key in self.keys:
            for part in _PARTS:
                self._open_part(key, part)
        self.journal = open(self.folder / "journal.jsonl", "a")  # noqa: SIM115

    def _read_journal(self) -> Progress | None:
        try:
            plan = json.loads((self.folder / "plan.json").read_bytes())
            lines = (self.folder / "journal.jsonl").read_text().splitlines()
        except (OSError, ValueError):
            return None
        changed = [name for name in self.plan if plan.get(name) != self.plan[name]]
        if changed:
            raise ValueError(
                f"--resume: {', '.join(changed)} changed since {self.folder} was started; run again as before, or "
                "without --resume to start over"
            )
        for line in reversed(lines):
            try:
                return Progress(**json.loads(line))
            except (ValueError, TypeError):
                continue  # the last line may be cut off
        return None

    def _holds(self, progress: Progress) -> bool:
        """Return whether all files of the journal exist (a run killed while moving them into place starts over)."""
        paths = [
            (self.folder / f"{key}.{part}", size)
            for key, parts in progress.sizes.items()
            for part, size in parts.items()
        ]
        return all(path.is_file() and path.stat().st_size >= size for path, size in paths)

    def _open_part(self, key: str, part: str) -> None:
        path = self.folder / f"{key}.{part}"
        good = self.progress.sizes.get(key, {}).get(part, 0)
        file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        file.truncate(good)
        if part == "tokens":
            update_from(file, self.digests[key])
        file.seek(good)
        self.files[key, part] = file

    @contextmanager
    def _telling_where(self) -> Iterator[None]:
        """Add the flag and the fix to an error of the system, such as a full disk."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"--output-prefix {self.prefix}: {error.strerror or error}; what is done so far is kept: make room and "
                "run the same command with --resume"
            ) from error

    @contextmanager
    def block(self) -> Iterator[Progress]:
        """Append one block and advance the progress; an error in between undoes both."""
        with self._telling_where(), self._undone_by_an_error():
            yield self.progress

    @contextmanager
    def _undone_by_an_error(self) -> Iterator[None]:
        before = copy.deepcopy(self.progress)
        ends = [(file, file.tell()) for file in self.files.values()]
        self.whole = False
        try:
            yield
            self.whole = True
        finally:
            if not self.whole:
                for file, end in ends:
                    file.seek(end)
                    file.truncate()
                self.progress, self.whole = before, True

    def append(self, key: str, tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> None:
        """Append documents: tokens in ``dtype``, number of tokens per sequence, number of sequences per document.

        ``ValueError`` for a sequence that is longer than the format can say.
        """
        if len(lengths) and int(lengths.max()) > np.iinfo(_SIZE).max:
            raise ValueError(
                f"a text of {int(lengths.max()):,} tokens: an .idx holds lengths below 2^31; split the text"
            )
        data = tokens.tobytes()
        self.digests[key].update(data)
        self.files[key, "tokens"].write(data)
        self.files[key, "lengths"].write(lengths.astype(_SIZE).tobytes())
        self.files[key, "counts"].write(counts.astype(_SIZE).tobytes())
        self.progress.tokens[key] += len(tokens)

    def commit(self) -> None:
        """Flush everything so far to disk and record it in the journal, unless undoing a block has failed."""
        if self.whole:
            with self._telling_where():
                self._commit()

    def _commit(self) -> None:
        for (key, part), file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            self.progress.sizes.setdefault(key, {})[part] = file.tell()
        self.journal.write(json.dumps(asdict(self.progress)) + "\n")
        self.journal.flush()
        os.fsync(self.journal.fileno())

    def finish(self, description: dict[str, Any]) -> list[str]:
        """Write indices, move all files into place (.idx last) and return the finished prefixes."""
        self.commit()
        with self._telling_where():
            self._write_descriptions(description)
            self._publish()
        return list(self.targets.values())

    def _write_descriptions(self, description: dict[str, Any]) -> None:
        for key in self.keys:
            lengths, counts = self._map(key, "lengths"), self._map(key, "counts")
            write_index(self.folder / f"{key}.idx", self.dtype, lengths, counts)
            note = {
                **description,
                "documents": self.progress.documents,
                "tokens": self.progress.tokens[key],
                "bin_xxh3_64": self.digests[key].hexdigest(),
                "plan": self.plan,
            }
            write_atomically(self.folder / f"{key}.note", json.dumps(note, indent=1))

    def _publish(self) -> None:
        for key in self.keys:
            self.target(key, ".idx").unlink(missing_ok=True)  # the old index does not fit the new tokens
            os.replace(self.folder / f"{key}.tokens", self.target(key, ".bin"))
            os.replace(self.folder / f"{key}.note", self.target(key, ".json"))
            os.replace(self.folder / f"{key}.idx", self.target(key, ".idx"))
        self.close()
        shutil.rmtree(self.folder)

    def _map(self, key: str, part: str) -> np.ndarray:
        path = self.folder / f"{key}.{part}"
        return np.memmap(path, _SIZE, "r") if path.stat().st_size else np.empty(0, _SIZE)

    def close(self) -> None:
        """Close the files and unlock the prefix."""
        for file in [*self.files.values(), getattr(self, "journal", None), getattr(self, "lock", None)]:
            if file is not None:
                file.close()
        self.files.clear()
