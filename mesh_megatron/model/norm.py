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
    """Norm with a scale (and shift) [K, D] of each loop; loops beyond K take the last one's."""

    def __init__(self, config: MeshTransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config, hidden_size, eps)  # type: ignore[call-arg,arg-type]
        for name, parameter in list(self.named_parameters()):
            setattr(self, name, torch.nn.Parameter(parameter.detach().repeat(config.loops_with_parameters, 1)))
        mark_sequence_parallel(self, config)


class LayerNormOfLoops(_OfLoops, LayerNorm):
    """LayerNorm with a scale and a shift of each loop."""

    def forward(self, state: Tensor | None, loop: int = 0) -> Any:  # type: ignore[override]
        """Normalise [S, B, D]; with None, return the loop's scale and shift for a caller that applies them."""
        scale, shift = (parameter[min(loop, len(parameter) - 1)] for parameter in (self.weight, self.bias))
        return (scale, shift) if state is None else F.layer_norm(state, self.normalized_shape, scale, shift, self.eps)


class RMSNormOfLoops(_OfLoops, RMSNorm):
    """RMSNorm with a scale of each loop."""

    def forward(self, state: Tensor | None, loop: int = 0) -> Any:  # type: ignore[override]
        """Normalise [S, B, D]; with None, return the loop's scale (no shift) for a caller that applies it."""
        scale = self.weight[min(loop, len(self.weight) - 1)]
        return (scale, None) if state is None else F.rms_norm(state, self.normalized_shape, scale, self.eps)


class _InLoop:
    """A norm of loops as a norm of one loop, now and where the backward pass computes it again."""

    def __init__(self, norm: Any, loop: int) -> None:
        self.norm, self.loop, self.normalize = norm, loop, norm.normalize

    def __call__(self, state: Tensor | None) -> Any:
        return self.norm(state, self.loop)


def norm_in_loop(norm: Any, loop: int) -> Any:
    """Return what normalises in ``loop``: the norm itself unless it has weights of each loop."""
    return _InLoop(norm, loop) if isinstance(norm, _OfLoops) else norm


NORMS = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
NORMS_OF_LOOPS = {"LayerNorm": LayerNormOfLoops, "RMSNorm": RMSNormOfLoops}
