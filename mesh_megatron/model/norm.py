"""Norms of the local spec with sequence parallelism, which Megatron-Core's torch wrapper does not support."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mesh_megatron.model.transformer_config import MeshTransformerConfig


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


class _OfLoops(torch.nn.Module):
    """Norm with a scale (and shift) [K, D] of each loop; ``loop`` says which one runs, loops beyond K take the last."""

    loop = 0

    def __init__(self, config: MeshTransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config, hidden_size, eps)  # type: ignore[call-arg,arg-type]
        for name, parameter in list(self.named_parameters()):
            setattr(self, name, torch.nn.Parameter(parameter.detach().repeat(config.loops_of_norms, 1)))
        mark_sequence_parallel(self, config)

    def of_loop(self, parameter: Tensor) -> Tensor:
        """Return the row [D] of the loop that runs."""
        return parameter[min(self.loop, len(parameter) - 1)]


class LayerNormOfLoops(_OfLoops, LayerNorm):
    """LayerNorm with a scale and a shift of each loop."""

    def forward(self, state: Tensor | None) -> Any:
        """Normalise [S, B, D]; with None, return the loop's scale and shift for a caller that applies them."""
        scale, shift = self.of_loop(self.weight), self.of_loop(self.bias)
        return (scale, shift) if state is None else F.layer_norm(state, self.normalized_shape, scale, shift, self.eps)


class RMSNormOfLoops(_OfLoops, RMSNorm):
    """RMSNorm with a scale of each loop."""

    def forward(self, state: Tensor | None) -> Any:
        """Normalise [S, B, D]; with None, return the loop's scale (no shift) for a caller that applies it."""
        scale = self.of_loop(self.weight)
        return (scale, None) if state is None else F.rms_norm(state, self.normalized_shape, scale, self.eps)


NORMS = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
NORMS_OF_LOOPS = {"LayerNorm": LayerNormOfLoops, "RMSNorm": RMSNormOfLoops}
