"""Norms of the local spec with sequence parallelism, which Megatron-Core's torch wrapper does not support."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def mark_sequence_parallel(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Make Megatron-Core sum this module's gradients over the ranks that share the sequence."""
    for parameter in module.parameters(recurse=False):
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm over the last dimension of [S, B, D]."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)

    def forward(self, state: Tensor | None) -> Any:
        """Normalise [S, B, D]; with None, return scale and shift for a caller that applies them elsewhere."""
        return (self.weight, self.bias) if state is None else super().forward(state)

    def normalize(self, state: Tensor) -> Tensor:
        """Normalise without scale and shift."""
        return F.layer_norm(state, self.normalized_shape, eps=self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension of [S, B, D]."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)

    def forward(self, state: Tensor | None) -> Any:
        """Normalise [S, B, D]; with None, return the scale (no shift) for a caller that applies it elsewhere."""
        return (self.weight, None) if state is None else super().forward(state)

    def normalize(self, state: Tensor) -> Tensor:
        """Without scale."""
        return F.rms_norm(state, self.normalized_shape, eps=self.eps)


NORMS = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
