"""Tiles that the memory and route kernels share: sizes, loads and stores.

A token is one (position, sequence) pair; a tile is ``TOKENS`` of them by ``CHANNELS`` of D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, CHANNELS = 16, 64
"""Size of a program's tile: the largest at which kernels spill few or no registers on sm_90 (K to 8, M to 16)."""
WIDE, WIDE_FROM_TOKENS = (64, 32), 8192
"""The forward kernel's tile if rows are aligned and there are enough tokens to fill a GPU with it: all warps then share
the router's product, which every warp repeats with the smaller tile."""
WEIGHT_CHUNKS = 64
"""Number of token ranges whose router gradients are summed separately first: fixed, for a fixed order of sums."""


def refuse_float64(state: Tensor) -> None:
    if state.dtype == torch.float64:
        raise ValueError("--memory-kernel fused has no float64: use --memory-kernel torch")


@triton.jit
def tile_of(tensor, strides, position, sequence, channel, inside):
    """Load [TOKENS, CHANNELS] of a strided [S, B, D] tensor in float32."""
    where = (position * strides[0] + sequence * strides[1])[:, None] + channel[None, :]
    return tl.load(tensor + where, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def router_tile(weight, column, channel, slots, width):
    """Load [LOGITS, CHANNELS] of the router's weight, zero beyond 2M rows."""
    inside = (column < 2 * slots)[:, None] & (channel < width)[None, :]
    return tl.load(weight + column[:, None] * width + channel[None, :], mask=inside, other=0.0)


@triton.jit
def logits_gradient(grad_routing, routing, token, real, column, slots, SIGMOID: tl.constexpr):
    """Compute ``memory.gated_backward``: p (g - <g, p>) in each half, or p (1 - p) g."""
    where = token[:, None] * (2 * slots) + column[None, :]
    inside = real[:, None] & (column < 2 * slots)[None, :]
    share = tl.load(routing + where, mask=inside, other=0.0)
    if SIGMOID:
        slope = share - share * share  # one register less than p (1 - p), which spills on sm_80
        gradient = slope * tl.load(grad_routing + where, mask=inside, other=0.0)
    else:
        weighted = share * tl.load(grad_routing + where, mask=inside, other=0.0)
        writes = (column < slots)[None, :]
        inner_write, inner_read = tl.sum(tl.where(writes, weighted, 0.0), 1), tl.sum(tl.where(writes, 0.0, weighted), 1)
        gradient = weighted - share * tl.where(writes, inner_write[:, None], inner_read[:, None])
    return gradient


@triton.jit
def store_routing(routing, logits, bias, token, real, column, slots, SIGMOID: tl.constexpr):
    """Store the routing of these tokens, from their products with the router's weight."""
    logits += tl.load(bias + column, mask=column < 2 * slots, other=0.0)[None, :]
    where = token[:, None] * (2 * slots) + column[None, :]
    inside = real[:, None] & (column < 2 * slots)[None, :]
    if SIGMOID:
        small = tl.exp(-tl.abs(logits))  # never overflows
        weights = tl.where(logits >= 0, 1.0, small) / (1 + small)
    else:
        weights = _softmax_halves(logits, column, slots)
    tl.store(routing + where, weights, mask=inside)


@triton.jit
def store_partial(partial_weight, partial_bias, grad_weight, grad_bias, chunk, tile, column, channel, slots, width):
    """Store a token chunk's share of the router's gradients for a tile of channels; tile 0 stores the bias's."""
    row = chunk * 2 * slots + column
    wanted = column < 2 * slots
    inside = wanted[:, None] & (channel < width)[None, :]
    tl.store(partial_weight + row[:, None] * width + channel[None, :], grad_weight, mask=inside)
    if tile == 0:
        tl.store(partial_bias + row, grad_bias, mask=wanted)


@triton.jit
def _softmax_halves(logits, column, slots):
    """Compute the softmax over columns 0..M-1 and over M..2M-1 of [TOKENS, LOGITS]; zero beyond."""
    writes, reads = (column < slots)[None, :], ((column >= slots) & (column < 2 * slots))[None, :]
    top_write = tl.max(tl.where(writes, logits, float("-inf")), 1)
    top_read = tl.max(tl.where(reads, logits, float("-inf")), 1)
    lowered = logits - tl.where(writes, top_write[:, None], top_read[:, None])
    powers = tl.exp(tl.where(writes | reads, lowered, float("-inf")))
    sum_write, sum_read = tl.sum(tl.where(writes, powers, 0.0), 1), tl.sum(tl.where(reads, powers, 0.0), 1)
    return powers / tl.where(writes, sum_write[:, None], sum_read[:, None])


def rows_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with contiguous channels; others are copied."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def logits_width(slots: int) -> int:
    """Return the columns of a router's tile: a power of two, at least 16, the minimum of ``tl.dot``."""
    return max(16, triton.next_power_of_2(2 * slots))
