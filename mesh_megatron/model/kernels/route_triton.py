"""The routing of a given state in Triton, with one pass over [S, B, D] forward and one backward.

Used for cycle 0, whose state is the embedding, and for every routing of a normalised state. The kernels in
``memory_triton.py`` compute the other routings together with the state; both share ``tiles.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesh_megatron.model.kernels.tiles import (
    CHANNELS,
    TOKENS,
    WEIGHT_CHUNKS,
    WIDE,
    logits_gradient,
    logits_width,
    refuse_float64,
    router_tile,
    rows_of,
    store_partial,
    store_routing,
    tile_of,
)
from mesh_megatron.model.memory import Gate


def forward(state: Tensor, weight: Tensor, bias: Tensor, gate: Gate = "softmax") -> Tensor:
    """Compute the routing [S, B, 2M] in float32; arguments as in ``memory_op.route``."""
    refuse_float64(state)
    (state,) = rows_of([state])
    positions, sequences, width = state.shape
    slots, tokens = len(weight) // 2, positions * sequences
    routing = torch.empty(positions, sequences, 2 * slots, dtype=torch.float32, device=state.device)
    _route_kernel[(triton.cdiv(tokens, WIDE[0]),)](
        state,
        (state.stride(0), state.stride(1)),
        routing,
        weight.contiguous(),
        bias.contiguous(),
        tokens,
        sequences,
        width,
        slots,
        TOKENS=WIDE[0],
        CHANNELS=WIDE[1],
        LOGITS=logits_width(slots),
        SIGMOID=gate == "sigmoid",
    )
    return routing


def backward(
    grad_routing: Tensor, routing: Tensor, state: Tensor, weight: Tensor, gate: Gate = "softmax"
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of state [S, B, D], weight [2M, D] and bias [2M]."""
    (state,) = rows_of([state])
    positions, sequences, width = state.shape
    slots, tokens = len(weight) // 2, positions * sequences
    chunks = min(WEIGHT_CHUNKS, triton.cdiv(tokens, TOKENS))
    grad_state = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    partial_weight = torch.empty(chunks, 2 * slots, width, dtype=torch.float32, device=state.device)
    partial_bias = torch.empty(chunks, 2 * slots, dtype=torch.float32, device=state.device)
    _route_backward_kernel[(chunks, triton.cdiv(width, CHANNELS))](
        state,
        (state.stride(0), state.stride(1)),
        grad_routing.contiguous(),
        routing,
        weight.contiguous(),
        grad_state,
        partial_weight,
        partial_bias,
        tokens,
        triton.cdiv(triton.cdiv(tokens, TOKENS), chunks),
        sequences,
        width,
        slots,
        TOKENS=TOKENS,
        CHANNELS=CHANNELS,
        LOGITS=logits_width(slots),
        SIGMOID=gate == "sigmoid",
    )
    return grad_state, partial_weight.sum(0), partial_bias.sum(0)


@triton.jit
def _route_kernel(
    state,
    strides,
    routing,
    weight,
    bias,
    tokens,
    batch,
    width,
    slots,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOGITS: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    real = token < tokens
    position, sequence = token // batch, token % batch
    column = tl.arange(0, LOGITS)
    logits = tl.zeros((TOKENS, LOGITS), tl.float32)
    for start in range(0, width, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        tile = tile_of(state, strides, position, sequence, channel, real[:, None] & (channel < width)[None, :])
        router = router_tile(weight, column, channel, slots, width)
        logits = tl.dot(tile, tl.trans(router), logits, input_precision="tf32x3")
    store_routing(routing, logits, bias, token, real, column, slots, SIGMOID)


@triton.jit
def _route_backward_kernel(
    state,
    strides,
    grad_routing,
    routing,
    weight,
    grad_state,
    partial_weight,
    partial_bias,
    tokens,
    blocks_per_chunk,
    batch,
    width,
    slots,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOGITS: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """Process one tile of channels of one chunk of tokens, like ``memory_triton._backward_kernel``."""
    chunk, tile = tl.program_id(0), tl.program_id(1)
    channel, column = tile * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, LOGITS)
    router = router_tile(weight, column, channel, slots, width)
    grad_weight = tl.zeros((LOGITS, CHANNELS), tl.float32)
    grad_bias = tl.zeros((LOGITS,), tl.float32)
    last = tl.minimum((chunk + 1) * blocks_per_chunk, tl.cdiv(tokens, TOKENS))
    for block in tl.range(chunk * blocks_per_chunk, last, num_stages=2):
        token = block * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
        real = token < tokens
        inside = real[:, None] & (channel < width)[None, :]
        grad_logits = logits_gradient(grad_routing, routing, token, real, column, slots, SIGMOID)
        gradient = tl.dot(grad_logits, router, input_precision="tf32x3")
        where = token[:, None] * width + channel[None, :]
        tl.store(grad_state + where, gradient.to(grad_state.dtype.element_ty), mask=inside)
        rows = tile_of(state, strides, token // batch, token % batch, channel, inside)
        grad_weight = tl.dot(tl.trans(grad_logits), rows, grad_weight, input_precision="tf32x3")
        grad_bias += tl.sum(grad_logits, 0)
    store_partial(partial_weight, partial_bias, grad_weight, grad_bias, chunk, tile, column, channel, slots, width)
