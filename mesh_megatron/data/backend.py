"""The fastest library that gives a tokenizer's ids, trusted only after it gave the same ids on the input itself.

``gigatoken`` reads tokenizer.json, SentencePiece BPE models and tiktoken ranks, and is ten and more times as fast as
the vendors' libraries. It keeps every word it has seen; ``Gigatoken`` starts afresh when that takes too much memory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import psutil

from mesh_megatron.data.library_errors import as_value_error
from mesh_megatron.data.tokenizers import HuggingFace, SentencePiece, TikToken, Tokenizer

Choice = Literal["auto", "gigatoken", "vendor"]

# Texts that tokenizers have been seen to disagree on, besides the sample of the input.
TRICKY = (
    "",
    " ",
    "\n\n\n",
    "\t \t  x\r\n",
    "  two  spaces   three ",
    "naïve café e\u0301 \ufb01 \u00a0 \u200b \ufeff",
    "1234567890 3.14 0x1F 1,000,000",
    "don't we'll I'M 'S",
    "日本語テキスト 한국어 العربية עברית ไทย",
    "🙂👩‍👩‍👧🇩🇪",
    "<|endoftext|> <s> </s> <unk> <pad> <|padding|>",
    "\u2581under\u2581score ▁",
    "a" * 3000,
    "\x00\x01\x7f",
    "def f(x):\n    return x  # 注释\n",
)


class Encoded(NamedTuple):
    """Ids of a batch of texts: those of text i are ``ids[ends[i] - lengths[i] : ends[i]]``."""

    ids: np.ndarray
    lengths: np.ndarray


class Backend(Protocol):
    name: str

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text."""
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
        return Encoded(ids, lengths)


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
            rows = self.inner.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(rows.offsets.data)
        return Encoded(np.asarray(rows.content.data)[offsets[0] : offsets[-1]], np.diff(offsets))


def load_gigatoken(tokenizer: Tokenizer) -> Any:
    """The same tokenizer in gigatoken, or ``ValueError`` saying why not."""
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
    """The model with <s>, </s> and the like renamed to what no text holds: gigatoken would find them in text, where
    SentencePiece sees plain characters."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    model = ModelProto.FromString(tokenizer.processor.serialized_model_proto())
    for number, piece in enumerate(model.pieces):
        if piece.type == ModelProto.SentencePiece.CONTROL:
            piece.piece = f"\U0010fffd{number}\U0010fffd"
    return model.SerializeToString()


def choose_backend(tokenizer: Tokenizer, choice: Choice, sample: Sequence[str]) -> tuple[str, str]:
    """(name of the backend, why), decided on ``sample`` of the input and ``TRICKY`` texts.

    ``ValueError`` if gigatoken is demanded and cannot load the tokenizer or gives other ids.
    """
    if choice == "vendor":
        return "vendor", "asked for"
    try:
        fast = Gigatoken(tokenizer)
        require_equal(fast, Vendor(tokenizer), [*TRICKY, *sample])
    except ValueError as error:
        if choice == "gigatoken":
            raise ValueError(f"--tokenizer-backend gigatoken: {error}; use --tokenizer-backend vendor") from error
        return "vendor", str(error)
    return "gigatoken", f"same ids as the vendor's library on {len(sample)} documents of the input"


def require_equal(fast: Backend, slow: Backend, texts: Sequence[str]) -> None:
    """``ValueError`` with the first of ``texts`` for which two backends differ."""
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


def make_backend(tokenizer: Tokenizer, name: str, cache_bytes: int) -> Backend:
    """A backend on one thread, whatever the library would do by itself."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return Gigatoken(tokenizer, cache_bytes) if name == "gigatoken" else Vendor(tokenizer)
