"""Tokenizers by Megatron-LM's flag names: build one from flags, or from settings."""

from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.data.tokenizers.registry import build_tokenizer, from_config, require_tokenizer

__all__ = ["Tokenizer", "build_tokenizer", "from_config", "require_tokenizer"]
