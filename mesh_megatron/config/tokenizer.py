"""Tokenizer settings: the flags of training, preprocessing and inspection."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from mesh_megatron.config.bounds import Bounds, Count

TokenizerType = Literal[
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "TikTokenizer",
    "ByteLevelTokenizer",
    "NullTokenizer",
]
TOKENIZERS_WITHOUT_MODEL = ("GPT2BPETokenizer", "ByteLevelTokenizer", "NullTokenizer")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Tokenizer: its kind, its model, and the options of some kinds."""

    tokenizer_type: TokenizerType | None = None
    """Kind of tokenizer. Training needs none where --padded-vocab-size is given and no text is read; inspection without
    one shows ids."""
    tokenizer_model: Path | None = None
    """SentencePiece .model, Hugging Face tokenizer.json or folder, or tiktoken file."""
    vocab_file: Path | None = None
    """vocab.json of GPT2BPETokenizer, the kind that this flag chooses in training."""
    merge_file: Path | None = None
    """merges.txt of GPT2BPETokenizer."""
    vocab_size: Count | None = None
    """Vocabulary size of NullTokenizer (for data that already consists of ids), not counting its end-of-document
    token; or of TikTokenizer, counting special tokens."""
    tokenizer_hf_no_include_special_tokens: bool = False
    """Do not let a Hugging Face tokenizer add its own special tokens (such as <s>) to a document."""
    tiktoken_pattern: str = "v2"
    """Pattern by which tiktoken splits text: v1 or v2 (Megatron's), or gpt2, cl100k or o200k."""
    tiktoken_num_special_tokens: Annotated[int, Bounds(least=0)] = 1000
    """Number of ids that Megatron's .json tiktoken vocabularies reserve for special tokens."""

    def tokenizer(self) -> TokenizerConfig:
        """Return these settings alone, without those that a subclass adds."""
        return TokenizerConfig(**{field.name: getattr(self, field.name) for field in fields(TokenizerConfig)})

    def validate_tokenizer(self) -> None:
        """Raise ``ValueError`` if the kind of tokenizer needs something that is missing."""
        kind = self.tokenizer_type
        files = {"--vocab-file": self.vocab_file, "--merge-file": self.merge_file}
        for flag, path in files.items():
            if kind == "GPT2BPETokenizer" and path is None:
                raise ValueError(f"--tokenizer-type GPT2BPETokenizer needs {flag}")
            if kind != "GPT2BPETokenizer" and path is not None:
                raise ValueError(f"{flag} {path} belongs to --tokenizer-type GPT2BPETokenizer, not {kind}: drop it")
            if path is not None and not path.is_file():
                raise ValueError(f"{flag} {path}: no such file")
        if kind is None:
            if self.tokenizer_model is not None:
                raise ValueError(f"--tokenizer-model {self.tokenizer_model} needs its --tokenizer-type")
        elif kind == "NullTokenizer":
            if self.vocab_size is None:
                raise ValueError("--tokenizer-type NullTokenizer needs --vocab-size, the number of ids in the data")
        elif kind not in TOKENIZERS_WITHOUT_MODEL:
            if self.tokenizer_model is None:
                raise ValueError(f"--tokenizer-type {kind} needs --tokenizer-model")
            if not self.tokenizer_model.exists():
                raise ValueError(f"--tokenizer-model {self.tokenizer_model}: no such file or folder")
