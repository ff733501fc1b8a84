"""Core attention of the local spec: torch's scaled_dot_product_attention, with flash kernels on CPU and GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mesh_megatron.model.dropout import AttentionWeights, Masks, attend
from mesh_megatron.model.transformer_config import MeshTransformerConfig


class ScaledDotProductAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v, causal unless a mask is given; stores neither a causal mask nor the scores."""

    def __init__(
        self,
        config: MeshTransformerConfig,
        layer_number: int,
        *_: Any,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **__: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.layer_number = layer_number
        self.config = config
        self.tensor_rank = pg_collection.tp.rank() if pg_collection is not None else 0

    def forward(
        self,
        query_SBHd: Tensor,
        key_SBGd: Tensor,
        value_SBGd: Tensor,
        attention_mask: Tensor | None = None,
        attention_bias: Masks | None = None,
        **_: Any,
    ) -> Tensor:
        """Return [S, B, H * d]; ``attention_mask`` is [B or 1, 1, S, S], True where a query must not see a key.

        ``attention_bias`` brings the masks of dropout, if any (see ``layer.py``).
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHd, key_SBGd, value_SBGd))
        if (dropout := self.dropout(attention_bias, query)) is not None:
            return attend(query, key, value, attention_mask, dropout).permute(2, 0, 1, 3).flatten(2)
        mask = None if attention_mask is None else ~attention_mask
        out_BHSd = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )  # fmt: skip
        return out_BHSd.permute(2, 0, 1, 3).flatten(2)

    def dropout(self, masks: Masks | None, query_BHSd: Tensor) -> AttentionWeights | None:
        """Return the dropout of this rank's attention weights in this layer, or None."""
        share, heads = self.config.hashed_attention_dropout, query_BHSd.size(1)
        if masks is None or not share:
            return None
        first = self.tensor_rank * heads
        scale = query_BHSd.size(-1) ** -0.5 if self.scale is None else self.scale
        mine = range(first, first + heads)
        return AttentionWeights.of_layer(masks, self.layer_number - 1, mine, share, scale)
