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
    """Return prefixes in the given order; a folder is replaced by its .bin/.idx pairs, sorted by name.

    ``ValueError`` for a pair that is named twice, by any path or link, as its documents would be counted twice.
    """
    prefixes: list[str] = []
    for item in inputs:
        if not item:
            raise ValueError("--input '': is empty; name a prefix or a folder")
        if Path(item).is_dir() and not Path(item + ".idx").is_file():
            found = sorted(str(path.with_suffix("")) for path in Path(item).glob("*.idx"))
            if not found:
                raise ValueError(f"--input {item}: no .idx in this folder")
            prefixes += found
        else:
            prefixes.append(item.removesuffix(".bin").removesuffix(".idx"))
    files = list(map(_file, prefixes))
    for prefix, file in zip(prefixes, files, strict=True):
        if files.count(file) > 1:
            raise ValueError(f"--input {prefix}: prefix listed twice; name each prefix once")
    return prefixes


def _file(prefix: str) -> str:
    """Return what identifies a pair, however its path is written."""
    return os.path.realpath(prefix + ".idx")


def merge(prefixes: Sequence[str], output_prefix: str, *, resume: bool = False, overwrite: bool = False) -> Progress:
    """Write ``output_prefix.{bin,idx,json}``; ``ValueError`` where dtypes or tokenizers differ or a file is broken.

    Memory holds one block of tokens or lengths at a time. An interrupted merge resumes at the start of a file.
    """
    if _file(output_prefix) in map(_file, prefixes):
        raise ValueError(f"--output-prefix {output_prefix} is one of the inputs")
    files = [read_indexed(prefix) for prefix in prefixes]
    for file in files:
        verify(file)
    shared = _shared_notes(files)
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
        output.finish({"format": "mesh_megatron", **shared})
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


def _shared_notes(files: Sequence[IndexedFile]) -> dict[str, Any]:
    """Return what is known of all ``files``: tokenizer and end of document, unless another tool wrote one of them.

    ``ValueError`` if two files differ in what is known of them.
    """
    first, shared = files[0], {}
    for file in files:
        if file.tokens.dtype != first.tokens.dtype:
            raise ValueError(
                f"{file.prefix} holds {file.tokens.dtype}, {first.prefix} {first.tokens.dtype}: they come from "
                "different vocabularies; preprocess with one tokenizer"
            )
        if file.multimodal:
            raise ValueError(f"{file.prefix}.idx holds a mode of each sequence (multimodal data), which a merge loses")
    notes = {file.prefix: read_description(file.prefix) for file in files}
    for key in ("tokenizer", "append_eod"):
        known = [(prefix, note[key]) for prefix, note in notes.items() if key in note]
        for prefix, value in known:
            if value != known[0][1]:
                raise ValueError(f"{prefix} and {known[0][0]} differ in their {key}: {value}, {known[0][1]}")
        if len(known) == len(files):
            shared[key] = known[0][1]
    return shared
