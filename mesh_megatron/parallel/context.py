"""Context parallelism: P ranks share a sequence in the balanced two-chunk order.

Of 2P equal chunks, rank r holds chunks r and 2P-1-r, so that causal attention costs the same on every rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from mesh_megatron.model.attention import ScaledDotProductAttention
from mesh_megatron.model.dropout import Masks, attend


def part_of_sequences(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut this rank's two chunks out of every [B, S] tensor, joined to [B, S / P].

    Without context parallelism the batch is returned unchanged.
    """
    rank, ranks = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return batch
    chunks = {name: tensor_BS.chunk(2 * ranks, dim=1) for name, tensor_BS in batch.items()}
    return {name: torch.cat([parts[rank], parts[-1 - rank]], dim=1) for name, parts in chunks.items()}


class ContextParallelAttention(ScaledDotProductAttention):
    """Causal attention of this rank's queries to all keys.

    Keys and values are all-gathered in the forward pass; their gradients are reduce-scattered in the backward pass.
    """

    def forward(
        self,
        query_SBHd: Tensor,
        key_SBGd: Tensor,
        value_SBGd: Tensor,
        attention_mask: Tensor | None = None,
        attention_bias: Masks | None = None,
        **_: Any,
    ) -> Tensor:
        """Return [S / P, B, H * d] of this rank's chunks; query [S / P, B, H, d], key and value [S / P, B, G, d]."""
        assert attention_mask is None, "the configuration rejects masks with context parallelism"
        group = parallel_state.get_context_parallel_group()
        rank, ranks = group.rank(), group.size()
        key, value = (_full_sequence(x, group).permute(1, 2, 0, 3) for x in (key_SBGd, value_SBGd))
        queries = query_SBHd.permute(1, 2, 0, 3).chunk(2, dim=2)
        length = queries[0].size(2)
        dropout = self.dropout(attention_bias, query_SBHd.permute(1, 2, 0, 3))
        outputs = []
        for place, (query, chunk) in enumerate(zip(queries, (rank, 2 * ranks - 1 - rank), strict=True)):
            visible = (chunk + 1) * length
            if dropout is not None:
                rows = replace(dropout, rows=dropout.rows.chunk(2, dim=2)[place])
                outputs.append(attend(query, key[:, :, :visible], value[:, :, :visible], None, rows))
                continue
            outputs.append(
                F.scaled_dot_product_attention(
                    query,
                    key[:, :, :visible],
                    value[:, :, :visible],
                    attn_mask=causal_lower_right(length, visible),
                    scale=self.scale,
                    enable_gqa=query.size(1) != key.size(1),
                )  # fmt: skip
            )
        return torch.cat(outputs, dim=2).permute(2, 0, 1, 3).flatten(2)


def _full_sequence(part: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Gather [S, ...] in sequence order from every rank's ``part`` [S / P, ...]."""
    ranks = group.size()
    chunks = gather_from_sequence_parallel_region(part, group=group).chunk(2 * ranks)  # rank 0's two, rank 1's two, ...
    return torch.cat([*chunks[0::2], *chunks[1::2][::-1]])
