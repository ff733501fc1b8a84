"""Provide the tokenizers of Megatron-LM's flags: the vendor's own library, with the ids Megatron-LM gets from it.

A ``Tokenizer`` has everything that ``megatron.core``'s datasets need (``vocab_size``, ``eod``,
``unique_identifiers``), and ``encode_batch`` for preprocessing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.data.tokenizers.library_errors import as_value_error
from mesh_megatron.data.tokenizers.stored_state import (
    add_stand_ins,
    drop_loaded_state,
    drop_state,
    identity_of_loaded,
    read_origin,
)
from mesh_megatron.util.hashing import hash_file

_TIKTOKEN_PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s"
    ),
    "o200k": "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
}
# Names of the end of document in a bare tokenizer.json, most specific first; a separator where it has no end.
_END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]", "<sep>")


class SentencePiece(Tokenizer):
    """A SentencePiece model, as ``spm_train`` writes it."""

    def __init__(self, kind: str, model: Path) -> None:
        import sentencepiece

        super().__init__(kind, model)
        with as_value_error(f"--tokenizer-model {model} is not a SentencePiece model"):
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.vocab_size = self.processor.get_piece_size()
        eos = self.processor.eos_id()
        self.eod = eos if eos >= 0 else None

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.encode(list(texts), num_threads=1)

    def _decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)


class HuggingFace(Tokenizer):
    """A ``tokenizer.json``, read by ``tokenizers`` alone (starts fast), or a folder, read by ``transformers``."""

    def __init__(self, kind: str, model: Path, include_special_tokens: bool = True) -> None:
        super().__init__(kind, model, include_special_tokens=include_special_tokens)
        self.include_special_tokens = include_special_tokens
        self.slow: Any = None
        eos: str | None = None
        with as_value_error(f"--tokenizer-model {model} is not a Hugging Face tokenizer"):
            if model.is_dir():
                self.inner, eos = self._from_folder(model)
            else:
                from tokenizers import Tokenizer as Fast

                self.inner = Fast.from_file(str(model))
                drop_state(self.inner)
        vocabulary = self.slow.get_vocab() if self.slow else self.inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(len(vocabulary), max(vocabulary.values(), default=-1) + 1)
        names = (eos,) if eos is not None else _END_OF_DOCUMENT
        self.eod = next((vocabulary[name] for name in names if name in vocabulary), None)

    def _from_folder(self, model: Path) -> tuple[Any, str | None]:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
        drop_loaded_state(loaded)
        add_stand_ins(loaded)
        self.unique_identifiers["fingerprint"] = identity_of_loaded(loaded)
        if self.include_special_tokens:  # as the conversion was verified
            self.converted_from = read_origin(loaded)
        if not loaded.is_fast:
            self.slow = loaded
            return None, loaded.eos_token
        return loaded.backend_tokenizer, loaded.eos_token

    def to_json(self) -> str:
        """Return the tokenizer.json; ``ValueError`` if it cannot describe the tokenizer completely."""
        if self.inner is None:
            raise ValueError("it is written in Python")
        if self.inner.encode_special_tokens:
            raise ValueError("it splits special tokens")
        return self.inner.to_str()

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        special = self.include_special_tokens
        if self.slow:
            return [self.slow(text, add_special_tokens=special)["input_ids"] for text in texts]
        return [encoding.ids for encoding in self.inner.encode_batch_fast(list(texts), add_special_tokens=special)]

    def _decode(self, ids: list[int]) -> str:
        return str((self.slow or self.inner).decode(ids, skip_special_tokens=False))


class GPT2BPE(HuggingFace):
    """GPT-2's vocab.json and merges.txt; ``<|endoftext|>`` ends a document."""

    def __init__(self, kind: str, vocabulary: Path, merges: Path) -> None:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Fast

        Tokenizer.__init__(self, kind)
        self.unique_identifiers["fingerprint"] = f"{hash_file(vocabulary)} {hash_file(merges)}"
        self.include_special_tokens, self.slow = True, None
        with as_value_error(f"--vocab-file {vocabulary} and --merge-file {merges} are not those of a byte-level BPE"):
            self.inner = Fast(models.BPE.from_file(str(vocabulary), str(merges)))
        self.inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.inner.decoder = decoders.ByteLevel()
        self.eod = self.inner.token_to_id("<|endoftext|>")
        if self.eod is not None:
            self.inner.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
        self.vocab_size = max(self.inner.get_vocab().values()) + 1


class TikToken(Tokenizer):
    """A tiktoken vocabulary: Megatron-LM's ``.json`` (special tokens first), or OpenAI's ``.tiktoken`` rank file
    (ids are ranks, ``<|endoftext|>`` after the last)."""

    def __init__(self, kind: str, model: Path, pattern: str, vocab_size: int | None, num_special_tokens: int) -> None:
        super().__init__(kind, model, pattern=pattern, vocab_size=vocab_size, num_special_tokens=num_special_tokens)
        self.pattern = pattern
        # gigatoken's names of the same split; it does not have Megatron's own patterns
        schemes = {"gpt2": "gpt2", "cl100k": "gpt4", "o200k": "o200k"}
        self.gigatoken_scheme = schemes.get(pattern) if model.suffix != ".json" else None
        with as_value_error(f"--tokenizer-model {model} is not a tiktoken vocabulary"):
            read = self._megatron if model.suffix == ".json" else self._ranks
            self.encoding = read(model, vocab_size, num_special_tokens)
        self.eod = self.encoding._special_tokens.get("</s>", self.encoding._special_tokens.get("<|endoftext|>"))

    def _megatron(self, model: Path, vocab_size: int | None, num_special_tokens: int) -> Any:
        from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

        if vocab_size is None:
            vocab_size = min(2**17, len(json.loads(model.read_bytes())) + num_special_tokens)
        self.vocab_size = vocab_size
        options = {"vocab_size": vocab_size, "num_special_tokens": num_special_tokens, "pattern": self.pattern}
        return TikTokenTokenizer(str(model), **options).tokenizer

    def _ranks(self, model: Path, vocab_size: int | None, num_special_tokens: int) -> Any:
        import tiktoken
        from megatron.core.tokenizers.text.libraries import tiktoken_tokenizer as megatron
        from tiktoken.load import load_tiktoken_bpe

        patterns = {"v1": megatron._PATTERN_TIKTOKEN_V1, "v2": megatron._PATTERN_TIKTOKEN_V2, **_TIKTOKEN_PATTERNS}
        if self.pattern not in patterns:
            raise ValueError(f"--tiktoken-pattern {self.pattern}: one of {', '.join(patterns)}")
        ranks = load_tiktoken_bpe(str(model))
        end = max(ranks.values()) + 1
        self.vocab_size = end + 1
        special = {"<|endoftext|>": end}
        return tiktoken.Encoding(
            model.stem, pat_str=patterns[self.pattern], mergeable_ranks=ranks, special_tokens=special
        )

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encoding.encode(text, allowed_special="all") for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)


class ByteLevel(Tokenizer):
    """UTF-8 bytes as ids 0..255, end of document 256."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.vocab_size, self.eod = 257, 256

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class Null(Tokenizer):
    """Text that consists of ids separated by white space, all below the flag's ``vocab_size``, which is the end of
    document."""

    def __init__(self, kind: str, vocab_size: int) -> None:
        super().__init__(kind, vocab_size=vocab_size)
        self.vocab_size, self.eod = vocab_size + 1, vocab_size

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))
