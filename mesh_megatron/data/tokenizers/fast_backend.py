"""Tokenize each text with the fastest library that gives the tokenizer's ids.

``gigatoken`` reads tokenizer.json, SentencePiece BPE models and tiktoken ranks, and is at least ten times as fast as
the vendors' libraries. It gets the texts that the proof covers (``proof.py``), the vendor's library all others. It
caches every word it has seen; ``Gigatoken`` reloads it when the cache takes too much memory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import psutil

from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.data.tokenizers.cover import Cover, Proof
from mesh_megatron.data.tokenizers.library_errors import as_value_error
from mesh_megatron.data.tokenizers.vendors import HuggingFace, SentencePiece, TikToken

_NOTHING = np.empty(0, dtype=np.uint32)


class Encoded(NamedTuple):
    """Ids of a batch of texts: those of text i are ``ids[ends[i] - lengths[i] : ends[i]]``."""

    ids: np.ndarray
    lengths: np.ndarray
    fast: np.ndarray
    """True for texts tokenized by gigatoken."""


class Backend(Protocol):
    name: str

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the ids of each text."""
        ...


class Vendor:
    """The tokenizer's own library."""

    name = "vendor"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Encoded:
        lists = self.tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        with as_value_error():  # an id of a NullTokenizer may be any number
            ids = np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int64, count=int(lengths.sum()))
        return Encoded(ids, lengths, np.zeros(len(lists), dtype=bool))


class Gigatoken:
    """gigatoken on the calling thread; ``ValueError`` where it cannot load the tokenizer."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, cache_bytes: int = 1 << 30) -> None:
        self.tokenizer, self.cache_bytes = tokenizer, cache_bytes
        self.process = psutil.Process()
        self._load()

    def _load(self) -> None:
        self.inner = load_gigatoken(self.tokenizer)
        self.start_bytes = self.process.memory_info().rss

    def encode(self, texts: Sequence[str]) -> Encoded:
        if self.process.memory_info().rss - self.start_bytes > self.cache_bytes:
            self._load()
        with as_value_error("gigatoken"):
            # A batch would import awkward, which takes more time than it saves.
            rows = [self.inner.encode(text) for text in texts]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return Encoded(np.concatenate(rows) if rows else _NOTHING, lengths, np.ones(len(rows), dtype=bool))


class Divided:
    """gigatoken for the texts that a proof covers, the vendor's library for the others."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, proof: Proof, cache_bytes: int) -> None:
        self.cover = Cover(proof)
        self.fast, self.slow = Gigatoken(tokenizer, cache_bytes), Vendor(tokenizer)

    def encode(self, texts: Sequence[str]) -> Encoded:
        fast = np.fromiter(map(self.cover, texts), dtype=bool, count=len(texts))
        if fast.all():
            return self.fast.encode(texts)
        if not fast.any():
            return self.slow.encode(texts)
        ours = self.fast.encode(list(itertools.compress(texts, fast)))
        theirs = self.slow.encode(list(itertools.compress(texts, ~fast)))
        lengths = np.empty(len(texts), dtype=np.int64)
        lengths[fast], lengths[~fast] = ours.lengths, theirs.lengths
        ids, whose = np.empty(int(lengths.sum()), dtype=np.int64), np.repeat(fast, lengths)
        ids[whose], ids[~whose] = ours.ids, theirs.ids
        return Encoded(ids, lengths, fast)


def load_gigatoken(tokenizer: Tokenizer) -> Any:
    """Load the same tokenizer in gigatoken; ``ValueError`` gives the reason if that is impossible."""
    try:
        import gigatoken
    except ImportError as error:
        raise ValueError(f"gigatoken is not installed ({error})") from error
    with as_value_error("gigatoken cannot load it"):
        if isinstance(tokenizer, SentencePiece):
            return gigatoken.Tokenizer.from_sentencepiece(_hide_control_symbols(tokenizer))
        if isinstance(tokenizer, HuggingFace):
            return gigatoken.Tokenizer.from_json(tokenizer.to_json())
        if isinstance(tokenizer, TikToken) and tokenizer.gigatoken_scheme and tokenizer.model is not None:
            scheme, special = tokenizer.gigatoken_scheme, tokenizer.encoding._special_tokens
            return gigatoken.Tokenizer.from_tiktoken(tokenizer.model, scheme, special)
    raise ValueError(f"gigatoken has no {tokenizer.kind}")


def _hide_control_symbols(tokenizer: SentencePiece) -> bytes:
    """Return the model with its control symbols (<s>, </s>) renamed to strings that no text contains: gigatoken would
    find them in text, where SentencePiece sees plain characters."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    model = ModelProto.FromString(tokenizer.processor.serialized_model_proto())
    for number, piece in enumerate(model.pieces):
        if piece.type == ModelProto.SentencePiece.CONTROL:
            piece.piece = f"\U0010fffd{number}\U0010fffd"
    return model.SerializeToString()


def require_equal(fast: Backend, slow: Backend, texts: Sequence[str]) -> None:
    """Raise ``ValueError`` with the first of ``texts`` for which two backends differ."""
    first, second = fast.encode(texts), slow.encode(texts)
    if np.array_equal(first.lengths, second.lengths) and np.array_equal(first.ids, second.ids):
        return
    for text in texts:
        ours, theirs = fast.encode([text]).ids.tolist(), slow.encode([text]).ids.tolist()
        if ours != theirs:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            raise ValueError(
                f"gigatoken gives other ids than the vendor's library from token {at} of {text[:60]!r} on: "
                f"{ours[at : at + 4]}, not {theirs[at : at + 4]}"
            )
    raise ValueError("gigatoken gives other ids in a batch than for its texts one by one")


def make_backend(tokenizer: Tokenizer, proof: Proof, cache_bytes: int) -> Backend:
    """Return a backend on one thread, whatever the library's default."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return Vendor(tokenizer) if proof.refusal else Divided(tokenizer, proof, cache_bytes)
