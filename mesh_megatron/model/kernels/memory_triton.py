"""The boundary's arithmetic in Triton: one kernel forward, two backward, one pass over the history each way.

``memory_torch.py`` is the other implementation, with the same ``forward`` and ``backward``. ``memory_op.py`` calls both
and explains what is saved and why earlier sources get no gradient here.

A token is one (position, sequence) pair; a program processes ``TOKENS`` of them, ``CHANNELS`` of D at a time.
The sources may have any strides over positions and sequences, so that a transposed or sliced view costs no copy. Sums
are float32 in a fixed order, without atomics. Router products use the tensor cores' three-term TF32, as exact as
float32; the routers read the state as it is stored, rounded to its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesh_megatron.model.kernels.memory_torch import Boundary, BoundaryGradients, LaterGradient
from mesh_megatron.model.kernels.tiles import (
    CHANNELS,
    TOKENS,
    WEIGHT_CHUNKS,
    WIDE,
    WIDE_FROM_TOKENS,
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


def forward(
    sources: Sequence[Tensor],
    routings: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Gate = "softmax",
) -> tuple[Tensor, Tensor | None]:
    """Compute ``memory_torch.forward`` in float32, bfloat16 or float16."""
    refuse_float64(sources[0])
    sources, routings = rows_of(sources), [routing.contiguous() for routing in routings]
    shape, slots = sources[0].shape, routings[0].shape[-1] // 2
    tokens = shape[0] * shape[1]
    state = torch.empty(shape, dtype=sources[0].dtype, device=sources[0].device)
    next_routing = None if weight is None else torch.empty_like(routings[0])
    wide = shape[2] % 16 == 0 and tokens >= WIDE_FROM_TOKENS
    rows, channels = WIDE if wide else (TOKENS, CHANNELS)
    _forward_kernel[(triton.cdiv(tokens, rows),)](
        tuple(sources),
        _strides(sources),
        tuple(routings),
        state,
        next_routing,
        weight if weight is None else weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        tokens,
        shape[1],
        shape[2],
        slots,
        ROUTE=weight is not None,
        SIGMOID=gate == "sigmoid",
        TOKENS=rows,
        CHANNELS=channels,
        SLOTS=triton.next_power_of_2(slots),
        LOGITS=logits_width(slots),
    )
    return state, next_routing


def backward(
    boundary: Boundary, grad_state: Tensor, grad_next_routing: Tensor | None, later: Sequence[LaterGradient]
) -> BoundaryGradients:
    """Compute ``memory_torch.backward``; the state is recomputed from the loaded sources instead of being read."""
    sources, routings, state, next_routing, weight, gate = boundary
    sources, (grad_state,) = rows_of(sources), rows_of([grad_state])
    routings = [routing.contiguous() for routing in routings]
    shape, slots, cycle = sources[0].shape, routings[0].shape[-1] // 2, len(routings) - 1
    tokens, width = shape[0] * shape[1], shape[2]
    route = weight is not None and next_routing is not None and grad_next_routing is not None
    tiles = triton.cdiv(width, CHANNELS)
    chunks = min(WEIGHT_CHUNKS, triton.cdiv(tokens, TOKENS))

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=state.device)

    gradient = empty(*shape, dtype=state.dtype) if route and cycle > 0 else None
    grad_output = empty(*shape, dtype=state.dtype)
    grad_embedding = empty(*shape, dtype=state.dtype) if cycle == 0 else None
    partial_products = empty(tiles, tokens, cycle + 2)
    partial_weight = empty(chunks, 2 * slots, width) if route else None
    partial_bias = empty(chunks, 2 * slots) if route else None
    later_gradients, later_routings = rows_of([g.state for g in later]), tuple(g.routing.contiguous() for g in later)
    sizes = {"SLOTS": triton.next_power_of_2(slots), "LOGITS": logits_width(slots), "TOKENS": TOKENS}
    _backward_kernel[(chunks, tiles)](
        tuple(sources),
        _strides(sources),
        tuple(routings),
        tuple(later_gradients),
        _strides(later_gradients),
        later_routings,
        grad_state,
        (grad_state.stride(0), grad_state.stride(1)),
        grad_next_routing.contiguous() if route and grad_next_routing is not None else None,
        next_routing,
        weight.contiguous() if route and weight is not None else None,
        gradient,
        grad_output,
        grad_embedding,
        partial_products,
        partial_weight,
        partial_bias,
        tokens,
        triton.cdiv(triton.cdiv(tokens, TOKENS), chunks),
        shape[1],
        width,
        slots,
        ROUTE=route,
        SIGMOID=gate == "sigmoid",
        CHANNELS=CHANNELS,
        **sizes,
    )
    products, grad_routing = empty(*shape[:2], cycle + 2), empty(*routings[0].shape)
    _routing_backward_kernel[(triton.cdiv(tokens, TOKENS),)](
        partial_products,
        tuple(routings),
        tuple(g.products for g in later),
        tuple(g.products.shape[-1] for g in later),
        later_routings,
        products,
        grad_routing,
        tokens,
        tiles,
        slots,
        SLOTS=sizes["SLOTS"],
        TOKENS=TOKENS,
    )
    return BoundaryGradients(
        state=None if cycle == 0 else grad_state if gradient is None else gradient,
        products=products,
        embedding=grad_embedding,
        output=grad_output,
        routing=grad_routing,
        weight=None if partial_weight is None else partial_weight.sum(0),
        bias=None if partial_bias is None else partial_bias.sum(0),
    )


@triton.jit
def _forward_kernel(
    sources,
    source_strides,
    routings,
    state,
    next_routing,
    weight,
    bias,
    tokens,
    batch,
    width,
    slots,
    ROUTE: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    LOGITS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    real = token < tokens
    position, sequence = token // batch, token % batch
    coefficients = _coefficients(routings, routings[len(routings) - 1], token, real, slots, SLOTS)
    column = tl.arange(0, LOGITS)
    logits = tl.zeros((TOKENS, LOGITS), tl.float32)
    for start in range(0, width, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = real[:, None] & (channel < width)[None, :]
        mixed = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for i in tl.static_range(len(sources)):
            mixed += coefficients[i][:, None] * tile_of(
                sources[i], source_strides[i], position, sequence, channel, inside
            )
        rounded = mixed.to(state.dtype.element_ty)
        tl.store(state + token[:, None] * width + channel[None, :], rounded, mask=inside)
        if ROUTE:
            router = router_tile(weight, column, channel, slots, width)
            logits = tl.dot(rounded.to(tl.float32), tl.trans(router), logits, input_precision="tf32x3")
    if ROUTE:
        store_routing(next_routing, logits, bias, token, real, column, slots, SIGMOID)


@triton.jit
def _backward_kernel(
    sources,
    source_strides,
    routings,
    later_gradients,
    later_strides,
    later_routings,
    grad_state,
    grad_state_strides,
    grad_next_routing,
    next_routing,
    weight,
    gradient_out,
    grad_output,
    grad_embedding,
    partial_products,
    partial_weight,
    partial_bias,
    tokens,
    blocks_per_chunk,
    batch,
    width,
    slots,
    ROUTE: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """Process one tile of channels of one chunk of tokens; the router's tile and its gradient stay in registers."""
    chunk, tile = tl.program_id(0), tl.program_id(1)
    channel, column = tile * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, LOGITS)
    LAST: tl.constexpr = len(routings) - 1
    if ROUTE:
        router = router_tile(weight, column, channel, slots, width)
        grad_weight = tl.zeros((LOGITS, CHANNELS), tl.float32)
        grad_bias = tl.zeros((LOGITS,), tl.float32)
    last = tl.minimum((chunk + 1) * blocks_per_chunk, tl.cdiv(tokens, TOKENS))
    for block in tl.range(chunk * blocks_per_chunk, last, num_stages=2):  # the next block's loads begin with this one's
        token = block * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
        real = token < tokens
        position, sequence = token // batch, token % batch
        inside = real[:, None] & (channel < width)[None, :]
        where = token[:, None] * width + channel[None, :]
        coefficients = _coefficients(routings, routings[LAST], token, real, slots, SLOTS)

        gradient = tile_of(grad_state, grad_state_strides, position, sequence, channel, inside)
        if ROUTE:
            grad_logits = logits_gradient(grad_next_routing, next_routing, token, real, column, slots, SIGMOID)
            gradient = tl.dot(grad_logits, router, gradient, input_precision="tf32x3")
            if gradient_out is not None:
                tl.store(gradient_out + where, gradient.to(gradient_out.dtype.element_ty), mask=inside)

        mixed = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for i in tl.static_range(len(sources)):
            source = tile_of(sources[i], source_strides[i], position, sequence, channel, inside)
            product = tl.sum(gradient * source, 1)
            tl.store(partial_products + (tile * tokens + token) * len(sources) + i, product, mask=real)
            if ROUTE:
                mixed += coefficients[i][:, None] * source
        if ROUTE:
            state = mixed.to(grad_output.dtype.element_ty).to(tl.float32)
            grad_weight = tl.dot(tl.trans(grad_logits), state, grad_weight, input_precision="tf32x3")
            grad_bias += tl.sum(grad_logits, 0)

        write = _half(routings[LAST], 0, token, real, slots, SLOTS)
        total = coefficients[LAST + 1][:, None] * gradient
        total_embedding = coefficients[0][:, None] * gradient
        for j in tl.static_range(len(later_gradients)):
            read = _half(later_routings[j], slots, token, real, slots, SLOTS)
            later = tile_of(later_gradients[j], later_strides[j], position, sequence, channel, inside)
            total += tl.sum(read * write, 1)[:, None] * later
            if grad_embedding is not None:
                total_embedding += _first(read, SLOTS)[:, None] * later
        tl.store(grad_output + where, total.to(grad_output.dtype.element_ty), mask=inside)
        if grad_embedding is not None:
            tl.store(grad_embedding + where, total_embedding.to(grad_embedding.dtype.element_ty), mask=inside)
    if ROUTE:
        store_partial(partial_weight, partial_bias, grad_weight, grad_bias, chunk, tile, column, channel, slots, width)


@triton.jit
def _routing_backward_kernel(
    partial_products,
    routings,
    later_products,
    later_widths,
    later_routings,
    products,
    grad_routing,
    tokens,
    tiles,
    slots,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Sum the products <g_c, source> over the tiles, and compute the gradients of w_c and r_c from them."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    real = token < tokens
    LAST: tl.constexpr = len(routings) - 1
    slot = tl.arange(0, SLOTS)
    grad_read = tl.zeros((TOKENS, SLOTS), tl.float32)
    product = tl.zeros((TOKENS,), tl.float32)
    for i in tl.static_range(len(routings) + 1):
        product = tl.zeros((TOKENS,), tl.float32)
        for tile in range(tiles):
            where = (tile * tokens + token) * (len(routings) + 1) + i
            product += tl.load(partial_products + where, mask=real, other=0.0)
        tl.store(products + token * (len(routings) + 1) + i, product, mask=real)
        if i == 0:  # the product with h_emb, the initial content of slot 0
            grad_read += tl.where(slot[None, :] == 0, product[:, None], 0.0)
        else:
            grad_read += product[:, None] * _half(routings[i - 1], 0, token, real, slots, SLOTS)
    grad_write = product[:, None] * _half(routings[LAST], slots, token, real, slots, SLOTS)
    for j in tl.static_range(len(later_products)):
        product = tl.load(later_products[j] + token * later_widths[j] + LAST + 1, mask=real, other=0.0)
        grad_write += product[:, None] * _half(later_routings[j], slots, token, real, slots, SLOTS)
    where_write = token[:, None] * (2 * slots) + slot[None, :]
    inside = real[:, None] & (slot < slots)[None, :]
    tl.store(grad_routing + where_write, grad_write, mask=inside)
    tl.store(grad_routing + where_write + slots, grad_read, mask=inside)


@triton.jit
def _coefficients(routings, last_routing, token, real, slots, SLOTS: tl.constexpr):
    """Compute the coefficient of each source in the next state: (r_0, <r, w_0>, ..., <r, w_c>), each [TOKENS]."""
    read = _half(last_routing, slots, token, real, slots, SLOTS)
    coefficients = (_first(read, SLOTS),)
    for i in tl.static_range(len(routings)):
        coefficients = coefficients + (tl.sum(read * _half(routings[i], 0, token, real, slots, SLOTS), 1),)  # type: ignore[assignment]
    return coefficients


@triton.jit
def _half(routing, offset, token, real, slots, SLOTS: tl.constexpr):
    """Load write (offset 0) or read weights (offset M) of [tokens, 2M]: [TOKENS, SLOTS], zero beyond M."""
    slot = tl.arange(0, SLOTS)
    where = token[:, None] * (2 * slots) + offset + slot[None, :]
    return tl.load(routing + where, mask=real[:, None] & (slot < slots)[None, :], other=0.0)


@triton.jit
def _first(read, SLOTS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SLOTS)[None, :] == 0, read, 0.0), 1)


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((tensor.stride(0), tensor.stride(1)) for tensor in tensors)
