"""Rotary positions in Triton: one read and one write of a tensor, arithmetic in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Largest number of channels that a program rotates."""


def turn(x_SBHd: Tensor, rotations: Tensor, backwards: bool) -> Tensor:
    """Rotate ``x_SBHd`` by cosines and sines ``rotations`` [2, S, 1, 1, R] in float32, or back; return a new tensor.

    If the channels of ``x_SBHd`` are not contiguous it is copied first; its other strides are free.
    """
    if x_SBHd.stride(-1) != 1:
        x_SBHd = x_SBHd.contiguous()
    positions, batch, heads, channels = x_SBHd.shape
    out = torch.empty(x_SBHd.shape, dtype=x_SBHd.dtype, device=x_SBHd.device)
    width = triton.next_power_of_2(channels)
    block = min(max(TILE // width, 1), triton.next_power_of_2(heads))
    cosines, sines = rotations.contiguous()
    _turn_kernel[(positions * batch, triton.cdiv(heads, block))](
        x_SBHd, out, cosines, sines, *x_SBHd.stride()[:3], batch, heads, channels, rotations.shape[-1],
        -1.0 if backwards else 1.0, HEADS=block, WIDTH=width,
    )  # fmt: skip
    return out


@triton.jit
def _turn_kernel(
    x, out, cosines, sines, stride_s, stride_b, stride_h, batch, heads, channels, rotary, direction,
    HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rotate ``HEADS`` heads of one token per program."""
    token = tl.program_id(0).to(tl.int64)
    position = token // batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (channel < channels)
    turns = channel < rotary
    half = rotary // 2
    partner = tl.where(channel < half, channel + half, channel - half)
    sign = tl.where(channel < half, -direction, direction)
    rows = x + position * stride_s + (token % batch) * stride_b + head * stride_h
    own = tl.load(rows + channel, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(rows + partner, mask=inside & turns, other=0.0).to(tl.float32)
    cosine = tl.load(cosines + position * rotary + channel, mask=turns, other=1.0)
    sine = tl.load(sines + position * rotary + channel, mask=turns, other=0.0)
    place = out + token * heads * channels + head * channels + channel
    tl.store(place, (own * cosine + sign * other * sine).to(out.dtype.element_ty), mask=inside)
