"""Define the interface of tokenizers for preprocessing and training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mesh_megatron.data.tokenizers.library_errors import as_value_error
from mesh_megatron.util.hashing import hash_file


class Tokenizer(ABC):
    """Text to ids and back. ``vocab_size`` counts every id; ``eod`` is None where the vocabulary has no such token.

    A text that the library refuses in any way raises ``ValueError``.
    """

    vocab_size: int
    eod: int | None

    def __init__(self, kind: str, model: Path | None = None, **options: Any) -> None:
        self.kind, self.model = kind, model
        # Identities of the tokenizers from which this one was converted, with equal ids: their data is this one's too.
        self.converted_from: list[dict[str, Any]] = []
        # megatron.core names its cached sample indices by this: it depends on the file's content, not its path.
        self.unique_identifiers = {"class": kind, **options}
        if model is not None and model.is_file():
            self.unique_identifiers["fingerprint"] = hash_file(model)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of one document without an end of document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each document; equal to ``tokenize`` of each."""
        with as_value_error():
            return self._encode(texts)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``."""
        with as_value_error():
            return self._decode(list(map(int, ids)))

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; may raise anything."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``; may raise anything."""
