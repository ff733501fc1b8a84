"""Build tokenizers by Megatron-LM's flag names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mesh_megatron.config.data import DataConfig
from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.data.tokenizers.stored_state import read_no_copies
from mesh_megatron.data.tokenizers.vendors import ByteLevel, HuggingFace, Null, SentencePiece, TikToken


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | Path | None = None,
    *,
    vocab_size: int | None = None,
    include_special_tokens: bool = True,
    tiktoken_pattern: str = "v2",
    tiktoken_num_special_tokens: int = 1000,
) -> Tokenizer:
    """Return the tokenizer that ``--tokenizer-type`` and ``--tokenizer-model`` name; ``ValueError`` if none."""
    read_no_copies()
    model = None if tokenizer_model is None else Path(tokenizer_model)
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None:
            raise ValueError("--tokenizer-type NullTokenizer needs --vocab-size, the number of ids in the data")
        return Null(tokenizer_type, vocab_size)
    if tokenizer_type == "ByteLevelTokenizer":
        return ByteLevel(tokenizer_type)
    if model is None:
        raise ValueError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model")
    if not model.exists():
        raise ValueError(f"--tokenizer-model {model}: no such file or folder")
    if tokenizer_type in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"):
        return SentencePiece(tokenizer_type, model)
    if tokenizer_type == "HuggingFaceTokenizer":
        return HuggingFace(tokenizer_type, model, include_special_tokens)
    if tokenizer_type == "TikTokenizer":
        return TikToken(tokenizer_type, model, tiktoken_pattern, vocab_size, tiktoken_num_special_tokens)
    raise ValueError(f"--tokenizer-type {tokenizer_type}: no such type of tokenizer")


def arguments(data: DataConfig) -> dict[str, Any]:
    """Return the arguments of ``build_tokenizer``; ``data`` must name a ``tokenizer_type``."""
    return {
        "tokenizer_type": data.tokenizer_type,
        "tokenizer_model": data.tokenizer_model,
        "vocab_size": data.vocab_size,
        "include_special_tokens": not data.tokenizer_hf_no_include_special_tokens,
        "tiktoken_pattern": data.tiktoken_pattern,
        "tiktoken_num_special_tokens": data.tiktoken_num_special_tokens,
    }


def from_config(data: DataConfig) -> Tokenizer | None:
    """Return the tokenizer that ``data`` names, or None."""
    return build_tokenizer(**arguments(data)) if data.tokenizer_type else None
