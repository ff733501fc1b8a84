"""Encode one block of documents in a worker process: tokens, sequence lengths and document sizes."""

from __future__ import annotations

import multiprocessing
import signal
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mesh_megatron.config.tokenizer import TokenizerConfig
from mesh_megatron.data.indexed import dtype_for
from mesh_megatron.data.preprocessing.documents import Document, parse
from mesh_megatron.data.preprocessing.readers import Block, Problem, SplitOptions
from mesh_megatron.data.preprocessing.sources import Source
from mesh_megatron.data.tokenizers import require_tokenizer
from mesh_megatron.data.tokenizers.cover import Proof
from mesh_megatron.data.tokenizers.fast_backend import Encoded, Vendor, make_backend, require_equal
from mesh_megatron.util.processes import die_with_parent

WATCHED_CHARACTERS = 1024


@dataclass(frozen=True)
class Job:
    """The settings of a worker."""

    tokenizer: TokenizerConfig
    split_options: SplitOptions
    append_eod: bool
    proof: Proof
    """Describes the texts that gigatoken may tokenize."""
    cache_bytes: int


class Tokens(NamedTuple):
    """A block's documents for one key."""

    tokens: np.ndarray
    lengths: np.ndarray
    """Tokens of each sequence."""
    counts: np.ndarray
    """Sequences of each document."""


class Result(NamedTuple):
    """The result of encoding a block."""

    keys: list[Tokens]
    documents: int
    by_gigatoken: int
    """Documents tokenized by gigatoken; the vendor's library tokenized the others."""
    problems: list[Problem]
    lines: int
    empty: int
    """Documents without tokens under one of the keys; they are written too."""


class _Encoded(NamedTuple):
    ids: np.ndarray
    lengths: np.ndarray
    owners: np.ndarray
    """Document of each sequence."""
    fast: np.ndarray
    """True for sequences tokenized by gigatoken."""


class Encoder:
    """Encodes blocks with one tokenizer, on one thread."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokenizer = require_tokenizer(job.tokenizer)
        self.backend = make_backend(self.tokenizer, job.proof, job.cache_bytes)
        self.vendor = Vendor(self.tokenizer)
        self.dtype = dtype_for(self.tokenizer.vocab_size)

    def __call__(self, block: Block, source: Source) -> Result:
        documents, problems, lines = parse(block, source, self.job.split_options)
        encoded = [self._encode(documents, key) for key in range(len(self.job.split_options.json_keys))]
        if any(item is None for item in encoded):
            documents = self._encodable(documents, problems)
            encoded = [self._encode(documents, key) for key in range(len(self.job.split_options.json_keys))]
        keep, fast = np.ones((2, len(documents)), dtype=bool)
        empty = np.zeros(len(documents), dtype=bool)
        for item in encoded:
            assert item is not None
            self._judge(item, documents, keep, problems)
            empty |= np.bincount(item.owners, weights=item.lengths, minlength=len(documents)) == 0
            fast[item.owners[~item.fast]] = False
        keys = [self._layout(item, keep) for item in encoded if item is not None]
        return Result(keys, int(keep.sum()), int((keep & fast).sum()), problems, lines, int((keep & empty).sum()))

    def _encode(self, documents: list[Document], key: int) -> _Encoded | None:
        """Return the ids of one key; None if the tokenizer refuses one of the texts."""
        texts = [text for document in documents for text in document.texts[key]]
        parts = np.fromiter((len(document.texts[key]) for document in documents), np.int64, len(documents))
        if not texts:
            nothing = np.empty(0, np.int64)
            return _Encoded(nothing, nothing, nothing, np.empty(0, bool))
        self._watch(texts)
        try:
            ids, lengths, fast = self._ids(texts)
        except ValueError:
            return None
        return _Encoded(ids, lengths, np.repeat(np.arange(len(documents)), parts), fast)

    def _watch(self, texts: list[str]) -> None:
        """Compare both libraries on the beginning of one text per block; ``ValueError`` if the proof does not hold."""
        if self.backend.name == "vendor":
            return
        watched = [texts[0][:WATCHED_CHARACTERS]]
        try:
            self.vendor.encode(watched)
        except ValueError:
            return  # the vendor's library refuses this text; ``_ids`` handles that
        try:
            require_equal(self.backend, self.vendor, watched)
        except ValueError as error:
            raise ValueError(f"{error}; run again with --tokenizer-backend vendor") from error

    def _ids(self, texts: list[str]) -> Encoded:
        """Return ids from the backend or, if it fails, the vendor's library; ``ValueError`` if that fails too."""
        try:
            return self.backend.encode(texts)
        except ValueError:
            if self.backend.name == "vendor":
                raise
            return self.vendor.encode(texts)

    def _encodable(self, documents: list[Document], problems: list[Problem]) -> list[Document]:
        """Return the documents that the tokenizer accepts; each of the others becomes one problem."""
        good = []
        for document in documents:
            try:
                for texts in document.texts:
                    self._ids(texts)
                good.append(document)
            except ValueError as error:
                problems.append(Problem("not tokenizable", document.line, str(error)))
        return good

    def _judge(self, encoded: _Encoded, documents: list[Document], keep: np.ndarray, problems: list[Problem]) -> None:
        """Remove documents with ids outside the vocabulary from ``keep``."""
        ids, lengths, owners, _ = encoded
        if not len(ids) or (int(ids.max()) < self.tokenizer.vocab_size and int(ids.min()) >= 0):
            return
        wrong = np.flatnonzero((ids < 0) | (ids >= self.tokenizer.vocab_size))
        sequences = np.searchsorted(np.cumsum(lengths), wrong, side="right")
        for at, number in zip(wrong.tolist(), owners[sequences].tolist(), strict=True):
            if keep[number]:
                detail = f"id {ids[at]} is not in the vocabulary 0..{self.tokenizer.vocab_size - 1}"
                problems.append(Problem("id out of range", documents[number].line, detail))
                keep[number] = False

    def _layout(self, encoded: _Encoded, keep: np.ndarray) -> Tokens:
        """Return tokens as the file stores them: kept documents concatenated, each with its end of document. As in
        Megatron-LM's tool, a document without tokens has no sequences and gets no end of document."""
        ids, lengths, owners, _ = encoded
        stay = keep[owners] & (lengths > 0)
        if not stay.all():
            ids, lengths, owners = ids[np.repeat(stay, lengths)], lengths[stay], owners[stay]
        counts = np.bincount(owners, minlength=len(keep))[keep]
        if not self.job.append_eod:
            return Tokens(ids.astype(self.dtype), lengths, counts)
        lengths = np.array(lengths)
        last = np.cumsum(counts)[counts > 0] - 1  # sequence of each document
        lengths[last] += 1
        ends = np.cumsum(lengths)[last] - 1
        tokens = np.empty(int(lengths.sum()), dtype=self.dtype)
        is_text = np.ones(len(tokens), dtype=bool)
        is_text[ends] = False
        tokens[is_text] = ids
        tokens[ends] = self.tokenizer.eod
        return Tokens(tokens, lengths, counts)


_encoder: Encoder | None = None


def start_worker(job: Job) -> None:
    """Initialise a worker process: the parent handles Ctrl-C, and the worker ends with its parent."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        die_with_parent(parent.pid)
    _encoder = Encoder(job)


def encode_block(block: Block, source: Source) -> Result:
    """Return the tokens of a block; runs in a worker process."""
    assert _encoder is not None
    return _encoder(block, source)
