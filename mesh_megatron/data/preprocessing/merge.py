"""Merge indexed datasets into one; the bytes are those of ``megatron.core``'s builder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mesh_megatron.data.check import read_description
from mesh_megatron.data.indexed import IndexedFile, read_indexed, verify
from mesh_megatron.data.preprocessing.writer import DatasetWriter, Progress

BLOCK = 1 << 22


def list_prefixes(inputs: Sequence[str]) -> list[str]:
    """Return prefixes in the given order; a folder is replaced by its .bin/.idx pairs, sorted by name."""
    prefixes: list[str] = []
    for item in inputs:
        if Path(item).is_dir():
            found = sorted(str(path.with_suffix("")) for path in Path(item).glob("*.idx"))
            if not found:
                raise ValueError(f"--input {item}: no .idx in this folder")
            prefixes += found
        else:
            prefixes.append(item.removesuffix(".bin").removesuffix(".idx"))
    if len(set(prefixes)) < len(prefixes):
        twice = next(prefix for prefix in prefixes if prefixes.count(prefix) > 1)
        raise ValueError(f"--input {twice}: prefix listed twice; name each prefix once")
    return prefixes


def merge(prefixes: Sequence[str], output_prefix: str, *, resume: bool = False, overwrite: bool = False) -> Progress:
    """Write ``output_prefix.{bin,idx,json}``; ``ValueError`` where dtypes or tokenizers differ or a file is broken.

    Memory holds one block of tokens or lengths at a time. An interrupted merge resumes at the start of a file.
    """
    if output_prefix in prefixes:
        raise ValueError(f"--output-prefix {output_prefix} is one of the inputs")
    files = [read_indexed(prefix) for prefix in prefixes]
    for file in files:
        verify(file)
    notes = [read_description(prefix) for prefix in prefixes]
    _require_alike(files, notes)
    inputs = [
        [prefix, *((s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in map(os.stat, (prefix + ".bin", prefix + ".idx")))]
        for prefix in prefixes
    ]
    output = DatasetWriter(output_prefix, {"tokens": output_prefix}, files[0].tokens.dtype, {"input": inputs})
    if resume and output.finished():
        return output.progress
    output.open(resume=resume, overwrite=overwrite)
    try:
        for number in range(output.progress.source, len(files)):
            with output.block() as progress:
                _append(output, files[number])
                progress.source = number + 1
                progress.documents += files[number].documents
            output.commit()
        same: dict[str, Any] = {key: notes[0][key] for key in ("format", "tokenizer", "append_eod") if key in notes[0]}
        output.finish(same)
    finally:
        output.close()
    return output.progress


def _append(output: DatasetWriter, file: IndexedFile) -> None:
    none = np.empty(0, np.int32)
    for start in range(0, len(file.tokens), BLOCK):
        output.append("tokens", file.tokens[start : start + BLOCK], none, none)
    for start in range(0, len(file.lengths), BLOCK):
        output.append("tokens", none, file.lengths[start : start + BLOCK], none)
    for start in range(0, file.documents, BLOCK):
        output.append("tokens", none, none, np.diff(file.document_indices[start : start + BLOCK + 1]))


def _require_alike(files: Sequence[IndexedFile], notes: Sequence[dict[str, Any]]) -> None:
    first = files[0]
    for file, note in zip(files, notes, strict=True):
        if file.tokens.dtype != first.tokens.dtype:
            raise ValueError(
                f"{file.prefix} holds {file.tokens.dtype}, {first.prefix} {first.tokens.dtype}: they come from "
                "different vocabularies; preprocess with one tokenizer"
            )
        for key in ("tokenizer", "append_eod"):
            ours, theirs = notes[0].get(key), note.get(key)
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(f"{file.prefix} and {first.prefix} differ in their {key}: {theirs}, {ours}")
