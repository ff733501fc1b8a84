"""Norms of the local spec that know about sequence parallelism (Megatron-Core's torch wrapper refuses it)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


def mark_sequence_parallel(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Have Megatron-Core sum this module's gradients over the ranks that each saw a part of the sequence."""
    for parameter in module.parameters(recurse=False):
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm over the last dimension of [S, B, D]."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension of [S, B, D]."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)


NORMS = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
