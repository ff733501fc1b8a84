"""Core attention of the local spec: torch's scaled_dot_product_attention, with flash kernels on CPU and GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ScaledDotProductAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v, causal unless a mask is given; stores neither a causal mask nor the scores."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any
    ) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self, query_SBHd: Tensor, key_SBGd: Tensor, value_SBGd: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Return [S, B, H * d]; ``attention_mask`` is [B or 1, 1, S, S], True where a query must not see a key."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHd, key_SBGd, value_SBGd))
        mask = None if attention_mask is None else ~attention_mask
        out_BHSd = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )  # fmt: skip
        return out_BHSd.permute(2, 0, 1, 3).flatten(2)
