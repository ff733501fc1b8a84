"""Build tokenizers by Megatron-LM's flag names."""

from __future__ import annotations

from pathlib import Path

from mesh_megatron.config.tokenizer import TokenizerConfig
from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.data.tokenizers.stored_state import read_no_copies
from mesh_megatron.data.tokenizers.vendors import GPT2BPE, ByteLevel, HuggingFace, Null, SentencePiece, TikToken


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


def from_config(config: TokenizerConfig) -> Tokenizer | None:
    """Return the tokenizer that ``config`` names, or None."""
    return require_tokenizer(config) if config.tokenizer_type else None


def require_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer that ``config`` names; ``ValueError`` if it names none."""
    if config.tokenizer_type is None:
        raise ValueError("no tokenizer: give --tokenizer-type and --tokenizer-model")
    if config.tokenizer_type == "GPT2BPETokenizer":
        if config.vocab_file is None or config.merge_file is None:
            raise ValueError("--tokenizer-type GPT2BPETokenizer needs --vocab-file and --merge-file")
        read_no_copies()
        return GPT2BPE(config.tokenizer_type, config.vocab_file, config.merge_file)
    return build_tokenizer(
        config.tokenizer_type,
        config.tokenizer_model,
        vocab_size=config.vocab_size,
        include_special_tokens=not config.tokenizer_hf_no_include_special_tokens,
        tiktoken_pattern=config.tiktoken_pattern,
        tiktoken_num_special_tokens=config.tiktoken_num_special_tokens,
    )
