"""Dropout whose masks do not depend on the layout of ranks: a hash of seed, token, layer, and channel or key.

Each value is dropped or kept by its own 32-bit hash, computed from numbers that are the same wherever the value is
computed: --seed, the number of its token in the training data (sample times sequence length plus position), the
computed layer (a shared core has other masks in each loop), and its channel, or its head and key. So masks do not
depend on how tensors, sequences, layers or samples are split, nor on what was computed before: recomputation and a
resumed run give the same ones, and no random state is needed.

A mask is never kept: the backward pass computes it again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_PIECE = 2**24
"""Values whose hashes are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Masks:
    """The masks of one forward pass, from ``first_layer`` on."""

    seed: int
    tokens_BS: Tensor
    """Number of each token of this rank's part of the sequences in the training data; int64."""
    tokens_SB: Tensor
    """The same for the rows of a state, which sequence parallelism splits."""
    first_layer: int = 0

    @classmethod
    def of_pass(cls, tokens_BS: Tensor, seed: int, sequence_parallel: bool) -> Masks:
        """Return the masks of a pass over the tokens with these numbers."""
        tokens_SB = tokens_BS.t().contiguous()
        if sequence_parallel:
            tokens_SB = scatter_to_sequence_parallel_region(tokens_SB)
        return cls(seed=seed, tokens_BS=tokens_BS, tokens_SB=tokens_SB)

    def after(self, layers: int) -> Masks:
        """Return the masks of the part of the pass that follows so many more computed layers."""
        return replace(self, first_layer=self.first_layer + layers)

    def rows(self, tokens: Tensor, place: str, layer: int) -> Tensor:
        """Hash token numbers for one place in the model; int32 in the shape of ``tokens``."""
        name = f"dropout {self.seed} {place} {self.first_layer + layer}"
        low, high = (_signed(hashlib.sha256(f"{half} {name}".encode()).digest()) for half in ("low", "high"))
        hashed = mix((tokens >> 32).int() ^ high)
        return mix((tokens & 0xFFFFFFFF).int() ^ low ^ hashed)

    def drop(self, state_SBD: Tensor, place: str, layer: int, share: float) -> Tensor:
        """Set a ``share`` of a state's values to 0 and divide the others by 1 - ``share``."""
        return _Drop.apply(state_SBD, self, place, layer, share)


def mix(x: Tensor) -> Tensor:
    """Replace each int32 by a hash of it, in place (the mixing steps of MurmurHash3, other constants)."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed((0x846CA68B).to_bytes(4, "big"))
    x ^= (x >> 16) & 0xFFFF
    return x


def kept(rows: Tensor, columns: int, share: float) -> Tensor:
    """Return which values to keep, bool [..., columns], for hashed ``rows`` [...]: each with probability 1 - share."""
    hashed = mix(rows.unsqueeze(-1) + mix(torch.arange(columns, dtype=torch.int32, device=rows.device)))
    return hashed >= min(round(share * 2**32) - 2**31, 2**31 - 1)


class _Drop(torch.autograd.Function):
    """Dropout of a state; its backward drops the same values of the gradient."""

    @staticmethod
    def forward(ctx: Any, state_SBD: Tensor, masks: Masks, place: str, layer: int, share: float) -> Tensor:
        ctx.how = masks, place, layer, share
        return _dropped(state_SBD, *ctx.how)

    @staticmethod
    def backward(ctx: Any, gradient_SBD: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _dropped(gradient_SBD, *ctx.how), None, None, None, None


def _dropped(values_SBD: Tensor, masks: Masks, place: str, layer: int, share: float) -> Tensor:
    width = values_SBD.size(-1)
    pieces = max(1, _PIECE // width)
    rows = masks.rows(masks.tokens_SB, place, layer).flatten().split(pieces)
    result = (values_SBD * (1 / (1 - share))).contiguous()
    for part, some in zip(result.view(-1, width).split(pieces), rows, strict=True):
        part.masked_fill_(~kept(some, width, share), 0)
    return result


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Dropout of attention weights in one layer: ``rows`` are hashed token numbers [B, heads, queries]."""

    rows: Tensor
    share: float
    scale: float

    @classmethod
    def of_layer(cls, masks: Masks, layer: int, heads: range, share: float, scale: float) -> AttentionWeights:
        """Return the dropout of a layer's ``heads``, counted over all ranks."""
        numbers = torch.arange(heads.start, heads.stop, dtype=torch.int32, device=masks.tokens_BS.device)
        tokens = masks.rows(masks.tokens_BS, "attention weights", layer)
        return cls(rows=mix(tokens[:, None] + mix(numbers)[:, None]), share=share, scale=scale)


def attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, dropout: AttentionWeights) -> Tensor:
    """Compute dropout(softmax(q k^T scale)) v in blocks of queries, whose scores the backward pass computes again.

    ``query`` is [B, H, Q, d], ``key`` and ``value`` [B, G, K, d]; returns [B, H, Q, d]. The last query sees all keys,
    each query before it one less; ``hidden`` [B or 1, 1, Q, K], if given, says instead what a query must not see.
    """
    queries, keys = query.size(2), key.size(2)
    block = max(1, _PIECE // (query.size(0) * query.size(1) * keys))
    outputs = []
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        seen = keys - queries + stop if hidden is None else keys
        mask = None if hidden is None else hidden[:, :, start:stop]
        part = query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], mask
        rows = replace(dropout, rows=dropout.rows[:, :, start:stop])
        outputs.append(checkpoint(_attend, *part, rows, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outputs, dim=2)


def _attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, dropout: AttentionWeights) -> Tensor:
    """Attend with one block of queries; softmax and dropout are in float32."""
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1:3]
    if hidden is None:
        ones = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        hidden = ones.triu(keys - queries + 1)
    scores = (query.reshape(batch, groups, -1, query.size(-1)) @ key.transpose(2, 3)).view(batch, heads, queries, keys)
    weights = (scores.float() * dropout.scale).masked_fill(hidden, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~kept(dropout.rows, keys, dropout.share), 0) / (1 - dropout.share)
    return (weights.to(value.dtype).view(batch, groups, -1, keys) @ value).view(batch, heads, queries, -1)


def _signed(digest: bytes) -> int:
    """Read the first four bytes as an int32."""
    return int.from_bytes(digest[:4], "big", signed=True)
