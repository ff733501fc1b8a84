"""Read, verify and write Megatron's indexed dataset: PREFIX.bin and PREFIX.idx.

``.bin`` holds the concatenated ids of all documents. ``.idx`` holds, little endian,

    "MMIDIDX" 0 0, version 1 (u64), dtype code (u8), number of sequences S (u64), number of documents + 1 D (u64),
    lengths of the sequences (S x i32), their byte offsets in .bin (S x i64), first sequence of each document and S
    at the end (D x i64)

A document is one sequence unless its text was a list. Unlike ``megatron.core``'s reader this one needs no torch,
reports what is wrong with a broken file, and its arrays stay valid as long as they are referenced.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}


@dataclass(frozen=True)
class IndexedFile:
    """The arrays of one .bin/.idx pair, memory-mapped."""

    prefix: str
    tokens: np.ndarray
    """[all tokens], in the dtype of the file."""
    lengths: np.ndarray
    """Tokens of each sequence, int32 [S]."""
    pointers: np.ndarray
    """Byte offset of each sequence, int64 [S]."""
    document_indices: np.ndarray
    """First sequence of each document and S at the end, int64 [D]."""
    multimodal: bool = False
    """True if the .idx also holds a mode of each sequence, which Megatron-LM writes for multimodal data."""

    @property
    def documents(self) -> int:
        return len(self.document_indices) - 1

    def document_lengths(self) -> np.ndarray:
        """Return the number of tokens of each document, int64 [documents]."""
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return np.diff(ends[self.document_indices])

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document, in the dtype of the file."""
        first, last = self.document_indices[index], self.document_indices[index + 1]
        start = int(self.pointers[first]) // self.tokens.itemsize if first < len(self.pointers) else 0
        return self.tokens[start : start + int(self.lengths[first:last].sum())]


def dtype_for(vocab_size: int) -> np.dtype:
    """Return the dtype in which Megatron-LM stores ids of a vocabulary: uint16 or int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def read_indexed(prefix: str) -> IndexedFile:
    """Map a pair of files into memory; ``ValueError`` if one is truncated or does not belong to the other."""
    idx, bin_file = Path(prefix + ".idx"), Path(prefix + ".bin")
    for file in (idx, bin_file):
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
    size = idx.stat().st_size
    if size < HEADER.size:
        raise ValueError(f"{idx} is truncated: {size} bytes, less than a header; preprocess again")
    content = np.memmap(idx, dtype=np.uint8, mode="r")
    magic, version, code, sequences, boundaries = HEADER.unpack(content[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise ValueError(
            f"{idx} is not a Megatron .idx file (its header: {magic!r}, {version}, {code}); preprocess again"
        )
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (expected, expected + sequences):  # multimodal files add a mode of one byte per sequence
        fault = "truncated" if size < expected else "too long"
        raise ValueError(f"{idx} is {fault}: {size} bytes, {expected} for {sequences} sequences; preprocess again")
    start = HEADER.size
    lengths = content[start : start + 4 * sequences].view(np.int32)
    start += 4 * sequences
    pointers = content[start : start + 8 * sequences].view(np.int64)
    start += 8 * sequences
    document_indices = content[start : start + 8 * boundaries].view(np.int64)
    if not boundaries or document_indices[0] != 0 or document_indices[-1] != sequences:
        raise ValueError(f"{idx} is broken: its documents do not cover its {sequences} sequences; preprocess again")
    dtype = np.dtype(DTYPES[code])
    if dtype.kind == "f":
        raise ValueError(f"{idx} describes {dtype} numbers, which are no token ids; preprocess again")
    total = int(lengths.sum(dtype=np.int64)) * dtype.itemsize
    if bin_file.stat().st_size != total:
        raise ValueError(
            f"{bin_file} holds {bin_file.stat().st_size} bytes, {idx.name} expects {total}: one is truncated or "
            "belongs to another run; preprocess again"
        )
    tokens = np.memmap(bin_file, dtype=dtype, mode="r") if total else np.empty(0, dtype)
    return IndexedFile(prefix, tokens, lengths, pointers, document_indices, multimodal=size > expected)


def verify(file: IndexedFile) -> None:
    """Check every offset and boundary, not only sizes; ``ValueError`` names the first that is wrong."""
    if len(file.lengths) and file.lengths.min() < 0:
        raise ValueError(f"{file.prefix}.idx is broken: sequence {int(file.lengths.argmin())} has a negative length")
    ends = np.cumsum(file.lengths, dtype=np.int64) * file.tokens.itemsize
    wrong = np.flatnonzero(file.pointers != np.concatenate([[0], ends[:-1]])[: len(ends)])
    if len(wrong):
        raise ValueError(f"{file.prefix}.idx is broken: sequence {wrong[0]} starts at byte {file.pointers[wrong[0]]}")
    wrong = np.flatnonzero(np.diff(file.document_indices) < 0)
    if len(wrong):
        raise ValueError(f"{file.prefix}.idx is broken: document {wrong[0]} ends before it starts")


def write_index(path: Path, dtype: np.dtype, lengths: np.ndarray, counts: np.ndarray, block: int = 1 << 20) -> None:
    """Write an .idx to disk from the length of each sequence [S] and the number of sequences of each document [D - 1].

    Memory-mapped arrays are read one block at a time.
    """
    code = next(code for code, known in DTYPES.items() if np.dtype(known) == dtype)
    with open(path, "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(counts) + 1))
        for start in range(0, len(lengths), block):
            stream.write(lengths[start : start + block].astype("<i4").tobytes())
        _write_starts(stream, lengths, dtype.itemsize, block)
        stream.write(np.int64(0).tobytes())
        _write_starts(stream, counts, 1, block, ends=True)
        stream.flush()
        os.fsync(stream.fileno())


def _write_starts(stream: BinaryIO, sizes: np.ndarray, unit: int, block: int, ends: bool = False) -> None:
    """Write where each of ``sizes`` starts (or ``ends``), in units of ``unit``, as int64."""
    offset = 0
    for start in range(0, len(sizes), block):
        sums = np.cumsum(sizes[start : start + block], dtype=np.int64) * unit + offset
        shifted = sums if ends else np.concatenate([[offset], sums[:-1]])
        stream.write(shifted.astype("<i8").tobytes())
        offset = int(sums[-1])
