"""Data settings: files, their mixture, the tokenizer and document boundaries."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mesh_megatron.config.bounds import Bounds, Count, check_bounds
from mesh_megatron.config.tokenizer import TokenizerConfig

_DECIMAL = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")  # the numbers that Megatron-Core reads in --split


@dataclass(frozen=True, kw_only=True)
class DataConfig(TokenizerConfig):
    """Data: files to train and evaluate on, how to split them, and where documents end."""

    data_path: tuple[str, ...] = ()
    """Prefixes of .bin/.idx pairs, or WEIGHT PREFIX pairs; without weights, prefixes are sampled in proportion to
    their tokens. A text, .jsonl or .parquet file works too: it is preprocessed once into the cache. Divided by
    --split."""
    split: str = "969,30,1"
    """Shares of the documents of --data-path for training, validation and test."""
    train_data_path: tuple[str, ...] = ()
    """Data used for training only, written as for --data-path; replaces --data-path."""
    valid_data_path: tuple[str, ...] = ()
    """Data used for validation only. Each NAME=PREFIX item is a separate validation set, reported under its name. (If
    a file called NAME=PREFIX exists, the item is read as a prefix.)"""
    test_data_path: tuple[str, ...] = ()
    """Data used for testing only."""
    multiple_validation_sets: bool = False
    """Evaluate each prefix of --valid-data-path separately, named by the last component of its path."""
    data_cache_path: Path | None = None
    """Folder for the sample index and for preprocessed text; default a folder `cache` beside the first data file.
    All nodes must see it."""
    mock_data: bool = False
    """Train on generated tokens, to measure throughput without data."""
    num_dataset_builder_threads: Count = 1
    """Number of prefixes of a blend that are indexed in parallel."""

    reset_attention_mask: bool = False
    """Restrict attention to a token's own document, and so positions, which are relative; materialises an attention
    mask."""
    eod_mask_loss: bool = False
    """Compute no loss at positions whose input is an end-of-document token."""
    num_workers: Annotated[int, Bounds(least=0)] = 2
    """Data loader processes per rank that prefetch batches; 0 reads in the training process."""

    @property
    def per_split(self) -> bool:
        """True if training, validation or test data have separate paths."""
        return bool(self.train_data_path or self.valid_data_path or self.test_data_path)

    @property
    def validation_sets(self) -> dict[str, tuple[str, ...]]:
        """Map each validation set's name in --valid-data-path to its blend; a single set is named ``validation``."""
        items = self.valid_data_path
        named = [named_path(item) for item in items]
        if any(name for name, _ in named):
            if not all(name for name, _ in named):
                raise ValueError(f"--valid-data-path {' '.join(items)}: name every set (NAME=PREFIX) or none")
        elif self.multiple_validation_sets:
            paths = [path for _, path in read_blend("--valid-data-path", items)]
            named = [(Path(path).name, path) for path in paths]
        else:
            return {"validation": items} if items else {}
        names = [str(name) for name, _ in named]
        if len(set(names)) < len(names):
            raise ValueError(f"--valid-data-path {' '.join(items)}: two sets have one name; write NAME=PREFIX")
        return {str(name): (path,) for name, path in named}

    def sources(self) -> dict[str, list[str]]:
        """Map each data flag to its paths, without weights and names; raise ``ValueError`` for a malformed blend."""
        flags = {"--data-path": self.data_path, "--train-data-path": self.train_data_path}
        flags["--test-data-path"] = self.test_data_path
        paths = {flag: [path for _, path in read_blend(flag, items)] for flag, items in flags.items()}
        sets = self.validation_sets.values()
        paths["--valid-data-path"] = [path for blend in sets for _, path in read_blend("--valid-data-path", blend)]
        return paths

    def validate(self) -> None:
        """Raise ``ValueError`` naming the flag, its value and the fix; reads file sizes, needs no ranks."""
        check_bounds(self)
        self.validate_tokenizer()
        if self.tokenizer_type is None and (self.reset_attention_mask or self.eod_mask_loss):
            raise ValueError(
                "--reset-attention-mask and --eod-mask-loss need the tokenizer's end of document: give "
                "--tokenizer-type and --tokenizer-model"
            )
        parse_split(self.split)
        if self.mock_data:
            if self.data_path or self.per_split:
                raise ValueError("--mock-data generates its data: drop it, or drop the --...data-path flags")
            return
        if self.data_path and self.per_split:
            raise ValueError("--data-path (divided by --split) and --train/valid/test-data-path exclude each other")
        if not self.data_path and not self.per_split:
            raise ValueError("no data: give --data-path PREFIX (tools/preprocess_data.py writes it) or --mock-data")
        for flag, paths in self.sources().items():
            for path in paths:
                self._validate_path(flag, path)

    def _validate_path(self, flag: str, path: str) -> None:
        pair = [Path(path + suffix) for suffix in (".bin", ".idx")]
        found = [file for file in pair if file.is_file()]
        if len(found) == 1:
            lost = next(file for file in pair if file not in found)
            raise ValueError(f"{flag} {path}: {found[0]} exists, {lost} does not; copy it or preprocess again")
        file = Path(path)
        for existing in found or [file]:
            if existing.is_file() and not os.access(existing, os.R_OK):
                raise ValueError(f"{flag} {path}: {existing} cannot be read: no permission; change its mode or owner")
        for part in found:
            if part.stat().st_size == 0:
                raise ValueError(f"{flag} {path}: {part} is empty; preprocess again")
        if found:
            return
        if file.suffix in (".bin", ".idx") and file.is_file():
            raise ValueError(f"{flag} {path}: give the prefix, without {file.suffix}: {path[: -len(file.suffix)]}")
        if file.is_dir():
            raise ValueError(
                f"{flag} {path}: is a folder; make one prefix of its files (tools/preprocess_data.py --input {path}) "
                "or name one text file"
            )
        if not file.is_file():
            raise ValueError(f"{flag} {path}: neither {pair[0]} with its .idx nor a text file of that name exists")
        if file.stat().st_size == 0:
            raise ValueError(f"{flag} {path}: the file is empty")
        if self.tokenizer_type is None:
            raise ValueError(f"{flag} {path} is text: give --tokenizer-type and --tokenizer-model to preprocess it")


def is_text(path: str) -> bool:
    """Return whether a path of a blend is a text file and not a prefix."""
    return not Path(path + ".idx").exists() and Path(path).is_file()


def named_path(item: str) -> tuple[str | None, str]:
    """Split ``NAME=PREFIX`` into (name, prefix); return (None, item) for anything else. A name contains no slash.

    If a file or prefix called ``item`` exists, such as date=2024/x, the item is a prefix; raise ``ValueError`` if
    PREFIX exists as well.
    """
    name, separator, path = item.partition("=")
    if not separator or not name or not path or "/" in name:
        return None, item
    if not _is_there(item):
        return name, path
    if _is_there(path):
        raise ValueError(f"--valid-data-path {item}: both {item} and {path} exist; write ./{item} or {name}=./{path}")
    return None, item


def _is_there(path: str, ends: Iterable[str] = ("", ".idx", ".bin")) -> bool:
    """Return whether ``path`` is a text file or a prefix, even if one file of the pair is missing."""
    return any(Path(path + end).is_file() for end in ends)


def read_blend(flag: str, items: Iterable[str]) -> list[tuple[float | None, str]]:
    """Return (weight, path) pairs of a blend, weights None if none are given; raise ``ValueError`` if malformed."""
    items = list(items)
    weights = [_number(item) for item in items]
    if all(weight is None for weight in weights):
        if twice := _listed_twice(items):
            raise ValueError(f"{flag} {' '.join(items)}: {twice} is listed twice: name it once, or give weights")
        return [(None, item) for item in items]
    for item, weight in zip(items, weights, strict=True):
        if weight is not None and _is_there(item, (".idx", ".bin")):
            weight_of = f"0{item} or " if item[0].isdecimal() else ""
            raise ValueError(f"{flag} {item}: a weight, or the prefix of that name? Write {weight_of}./{item}")
    text = f"{flag} {' '.join(items)}"
    paths = items[1::2]
    if len(items) % 2 or any(w is None for w in weights[::2]) or any(w is not None for w in weights[1::2]):
        raise ValueError(f"{text}: write WEIGHT PREFIX pairs (0.7 wiki 0.3 code), or prefixes without weights")
    pairs = [(weight or 0.0, path) for weight, path in zip(weights[::2], paths, strict=True)]
    if not all(0 < weight < float("inf") for weight, _ in pairs):
        raise ValueError(f"{text}: weights must be positive numbers")
    if twice := _listed_twice(paths):
        raise ValueError(f"{text}: {twice} is listed twice: combine the weights")
    return list(pairs)


def _listed_twice(paths: Iterable[str]) -> str | None:
    """Return a path that leads where an earlier one does; its samples would come twice, in the same order."""
    seen: set[str] = set()
    for path in paths:
        real = os.path.realpath(path + ".idx" if Path(path + ".idx").exists() else path)
        if real in seen:
            return path
        seen.add(real)
    return None


def parse_split(split: str) -> tuple[float, float, float]:
    """Return the shares of training, validation and test, which sum to 1; raise ``ValueError`` for a bad --split."""
    parts = split.strip("'\" ").split(",")  # scripts of Megatron-LM leave quotes around it
    shares = [float(part) for part in parts if _DECIMAL.fullmatch(part.strip())]
    if len(shares) != len(parts) or not 1 <= len(shares) <= 3 or not 0 < sum(shares) < float("inf"):
        raise ValueError(f"--split {split}: write up to three numbers for training, validation and test, as 969,30,1")
    shares += [0.0] * (3 - len(shares))
    return shares[0] / sum(shares), shares[1] / sum(shares), shares[2] / sum(shares)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
