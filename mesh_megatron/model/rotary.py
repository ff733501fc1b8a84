"""Rotary positions for layers without Transformer Engine: cosines once per pass, one kernel per tensor on a GPU.

A rotation turns channel pairs (j, j + R / 2) of the first R channels of a head: x cos + rotate_half(x) sin.
Megatron-Core computes the cosines again in every layer and needs about ten passes over queries and keys.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from mesh_megatron.model.transformer_config import MeshTransformerConfig


def rotations_of(angles_S11R: Tensor, config: MeshTransformerConfig) -> Tensor:
    """Compute the cosines and sines [2, S, 1, 1, R] that every layer of a pass applies to its queries and keys.

    They have the layers' dtype, or float32 for the kernel, which rounds only its result. If Transformer Engine applies
    the rotation (``apply_rope_fusion``), the angles are returned unchanged.
    """
    if config.apply_rope_fusion:
        return angles_S11R
    dtype = torch.float32 if config.fused_rotary else config.params_dtype
    return torch.stack([angles_S11R.cos(), angles_S11R.sin()]).to(dtype)


class RotarySelfAttention(SelfAttention):
    """Self-attention that rotates queries and keys by ``rotations_of``."""

    config: MeshTransformerConfig

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        attention_bias: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Call Megatron-Core's forward; it gets the rotations only if Transformer Engine applies them.

        ``attention_bias``, the masks of dropout, only goes to our own attention, which they choose.
        """
        if self.config.hashed_attention_dropout:
            kwargs["attention_bias"] = attention_bias
        self._rotations = rotary_pos_emb
        shown = rotary_pos_emb if self.config.apply_rope_fusion else None
        return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=shown, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Return query [S, B, H, d], key and value [S, B, G, d]; query and key are already rotated."""
        tensors = super().get_query_key_value_tensors(*args, **kwargs)
        if self.config.apply_rope_fusion:
            return tensors
        query, key, *rest = tensors
        return self.rotate(query), self.rotate(key), *rest

    def rotate(self, x_SBHd: Tensor) -> Tensor:
        """Apply the rotations of this pass, if there are any."""
        if self._rotations is None:
            return x_SBHd
        turn = _Turn.apply if self.config.fused_rotary else turn_by_torch
        return turn(x_SBHd, self._rotations)


def turn_by_torch(x_SBHd: Tensor, rotations: Tensor) -> Tensor:
    """Rotate ``x_SBHd`` with the arithmetic of Megatron-Core's own layers."""
    cosines, sines = rotations
    turned, kept = x_SBHd.tensor_split([cosines.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cosines + torch.cat([-second, first], dim=-1) * sines, kept], dim=-1)


class _Turn(torch.autograd.Function):
    """The fused rotation; its backward rotates the gradient by the negative angles."""

    @staticmethod
    def forward(ctx: Any, x_SBHd: Tensor, rotations: Tensor) -> Tensor:
        from mesh_megatron.model.kernels import rotary_triton  # needs Triton

        ctx.save_for_backward(rotations)
        return rotary_triton.turn(x_SBHd, rotations, backwards=False)

    @staticmethod
    def backward(ctx: Any, grad_SBHd: Tensor) -> tuple[Tensor, None]:
        from mesh_megatron.model.kernels import rotary_triton

        (rotations,) = ctx.saved_tensors
        return rotary_triton.turn(grad_SBHd, rotations, backwards=True), None
