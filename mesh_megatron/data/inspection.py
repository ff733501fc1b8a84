"""Describe an indexed dataset (counts, document lengths, frequent tokens, checksum, samples) and find damage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mesh_megatron.data.check import read_description
from mesh_megatron.data.indexed import IndexedFile, read_indexed, verify
from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.util.hashing import hash_file_64

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
BLOCK = 1 << 24
MOST_IDS = 1 << 26  # larger than any vocabulary: counting up to a damaged id would need its number of entries in memory


@dataclass(frozen=True)
class Inspection:
    """Everything that ``inspect_data.py`` prints about one prefix."""

    prefix: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    bytes: int
    empty_documents: int
    length_mean: float
    length_percentiles: dict[int, int]
    """Percent -> tokens of a document."""
    length_histogram: dict[int, int]
    """Power of two -> documents of that many tokens up to less than twice as many."""
    distinct_tokens: int
    highest_token: int
    frequent_tokens: dict[int, int]
    """Id -> number of occurrences, the most frequent first."""
    bin_xxh3_64: str
    description: dict[str, Any] = field(default_factory=dict)
    samples: dict[int, str] = field(default_factory=dict)
    """Document -> its first tokens, decoded if a tokenizer was given, else as ids."""


def inspect(
    prefix: str, tokenizer: Tokenizer | None = None, *, frequent: int = 10, samples: int = 3, sample_tokens: int = 64
) -> Inspection:
    """Read a prefix completely, one block at a time. ``ValueError`` for files that are truncated or of different runs,
    have wrong offsets, or changed since they were written."""
    file = read_indexed(prefix)
    verify(file)
    note = read_description(prefix)
    digest = hash_file_64(Path(prefix + ".bin"))
    if note and note.get("bin_xxh3_64") != digest:
        raise ValueError(
            f"{prefix}.bin has checksum {digest}, {prefix}.json records {note.get('bin_xxh3_64')}: it was changed or "
            "damaged since it was written; preprocess or copy it again"
        )
    lengths = file.document_lengths()
    try:
        counts = count_tokens(file.tokens)
    except ValueError as error:
        raise ValueError(f"{prefix}.bin: {error}; preprocess again") from error
    order = np.argsort(-counts, kind="stable")[:frequent]
    return Inspection(
        prefix=prefix,
        dtype=str(file.tokens.dtype),
        documents=file.documents,
        sequences=len(file.lengths),
        tokens=len(file.tokens),
        bytes=file.tokens.nbytes,
        empty_documents=int((lengths == 0).sum()),
        length_mean=float(lengths.mean()) if len(lengths) else 0.0,
        length_percentiles=_percentiles(lengths),
        length_histogram=_histogram(lengths),
        distinct_tokens=int((counts > 0).sum()),
        highest_token=len(counts) - 1,
        frequent_tokens={int(token): int(counts[token]) for token in order if counts[token]},
        bin_xxh3_64=digest,
        description=note,
        samples=_samples(file, tokenizer, samples, sample_tokens),
    )


def count_tokens(tokens: np.ndarray) -> np.ndarray:
    """Count the occurrences of each id, int64 [highest id + 1]; ``ValueError`` for an id of no vocabulary."""
    counts = np.zeros(0, dtype=np.int64)
    for start in range(0, len(tokens), BLOCK):
        part = tokens[start : start + BLOCK]
        if int(part.min()) < 0:
            raise ValueError(f"token {start + int(part.argmin())} is negative: {int(part.min())}")
        if int(part.max()) >= MOST_IDS:
            raise ValueError(f"token {start + int(part.argmax())} is {int(part.max())}: no vocabulary is so large")
        more = np.bincount(part, minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    return counts


def _percentiles(lengths: np.ndarray) -> dict[int, int]:
    if not len(lengths):
        return {}
    values = np.percentile(lengths, PERCENTILES, method="nearest")
    return {percent: int(value) for percent, value in zip(PERCENTILES, values, strict=True)}


def _histogram(lengths: np.ndarray) -> dict[int, int]:
    powers, counts = np.unique(np.floor(np.log2(np.maximum(lengths, 1))).astype(int), return_counts=True)
    return {1 << int(power): int(count) for power, count in zip(powers, counts, strict=True)}


def _samples(file: IndexedFile, tokenizer: Tokenizer | None, number: int, tokens: int) -> dict[int, str]:
    """Return the first ``tokens`` tokens of ``number`` documents spread over the file."""
    chosen = np.unique(np.linspace(0, file.documents - 1, min(number, file.documents)).astype(int)).tolist()
    texts = {}
    for index in chosen:
        ids = file.document(index)[:tokens].tolist()
        texts[index] = _decoded(ids, tokenizer, f"{file.prefix}: document {index}")
    return texts


def _decoded(ids: list[int], tokenizer: Tokenizer | None, where: str) -> str:
    try:
        return " ".join(map(str, ids)) if tokenizer is None else tokenizer.detokenize(ids)
    except ValueError as error:
        raise ValueError(f"{where} does not fit this tokenizer: {error}") from error


def report(found: Inspection, tokenizer: Tokenizer | None = None) -> str:
    """Return ``found`` as readable lines."""
    lines = [
        found.prefix,
        f"  {found.documents:,} documents, {found.sequences:,} sequences, {found.tokens:,} tokens, "
        f"{found.bytes:,} bytes",
        f"  {found.dtype}, {found.distinct_tokens:,} distinct ids, highest {found.highest_token}",
        f"  .bin xxh3-64 {found.bin_xxh3_64}" + (", as noted when it was written" if found.description else ""),
        "  .bin and .idx fit each other; every offset is right",
        f"  document lengths: mean {found.length_mean:.1f}, empty {found.empty_documents:,}",
        "    " + "  ".join(f"p{percent} {value:,}" for percent, value in found.length_percentiles.items()),
    ]
    most = max(found.length_histogram.values(), default=1)
    for start, count in found.length_histogram.items():
        lines.append(f"    {start:>10,} {'#' * max(1, round(40 * count / most)):<40} {count:,}")
    lines.append("  most frequent tokens:")
    for token, count in found.frequent_tokens.items():
        text = f" {_decoded([token], tokenizer, f'{found.prefix}: id {token}')!r}" if tokenizer else ""
        lines.append(f"    {token:>8} {count / found.tokens:7.2%} {count:,}{text}")
    for index, text in found.samples.items():
        lines += [f"  document {index}:", f"    {text!r}"]
    return "\n".join(lines)
