"""Tokenizers by Megatron-LM's flag names: build one from flags, or from a run's data settings."""

from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.data.tokenizers.registry import arguments, build_tokenizer, from_config

__all__ = ["Tokenizer", "arguments", "build_tokenizer", "from_config"]
