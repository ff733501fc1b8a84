"""Norms, rotary positions and padding of experts' tokens of ``transformer_engine_torch``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.rounding import quantize, torch_type


def layernorm_fwd(
    state: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, sm_margin: int,
    zero_centered: bool,
) -> tuple[Any, Tensor, Tensor]:  # fmt: skip
    """Return the normalised state, means, and reciprocal standard deviations."""
    assert out is None and not zero_centered
    wide = state.float()
    mean = wide.mean(-1)
    scale = (wide.var(-1, unbiased=False) + eps).rsqrt()
    normal = (wide - mean[..., None]) * scale[..., None] * weight.float() + bias.float()
    return _finish(normal, quantizer, dtype), mean, scale


def layernorm_bwd(
    gradient: Tensor, state: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide, normal = gradient.float(), (state.float() - mean[..., None]) * scale[..., None]
    inner = wide * weight.float()
    centred = inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True)
    dweight, dbias = ((x.flatten(0, -2).sum(0)).to(weight.dtype) for x in (wide * normal, wide))
    return (centred * scale[..., None]).to(state.dtype), dweight, dbias


def rmsnorm_fwd(
    state: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, sm_margin: int, zero_centered: bool
) -> tuple[Any, None, Tensor]:
    assert out is None and not zero_centered
    scale = (state.float().square().mean(-1) + eps).rsqrt()
    return _finish(state.float() * scale[..., None] * weight.float(), quantizer, dtype), None, scale


def rmsnorm_bwd(
    gradient: Tensor, state: Tensor, scale: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    wide, normal = gradient.float(), state.float() * scale[..., None]
    inner = wide * weight.float()
    turned = inner - normal * (inner * normal).mean(-1, keepdim=True)
    dweight = (wide * normal).flatten(0, -2).sum(0).to(weight.dtype)
    return (turned * scale[..., None]).to(state.dtype), dweight


def _finish(normal: Tensor, quantizer: Any, dtype: Any) -> Any:
    rounded = normal.to(torch_type(dtype))
    return rounded if quantizer is None else quantize(rounded, quantizer)


def fused_rope_forward(
    state_SBHd: Tensor, angles_S11R: Tensor, starts: Any, layout: str, interleaved: bool, lengths: Any, ranks: int,
    rank: int,
) -> Tensor:  # fmt: skip
    """Turn channel pairs (j, j + R / 2) of each head by their angles."""
    assert layout == "NVTE_SBHD" and starts is None and not interleaved and ranks == 1
    return _turn(state_SBHd, angles_S11R)


def fused_rope_backward(gradient_SBHd: Tensor, angles_S11R: Tensor, *options: Any) -> Tensor:
    return _turn(gradient_SBHd, -angles_S11R)


def _turn(state_SBHd: Tensor, angles_S11R: Tensor) -> Tensor:
    angles_S11R = angles_S11R[: state_SBHd.size(0)]
    turned, rest = state_SBHd.split([angles_S11R.size(-1), state_SBHd.size(-1) - angles_S11R.size(-1)], -1)
    first, second = turned.float().chunk(2, -1)
    result = turned.float() * angles_S11R.cos() + torch.cat([-second, first], -1) * angles_S11R.sin()
    return torch.cat([result.to(state_SBHd.dtype), rest], -1)


def fused_multi_row_padding(rows: Tensor, padded: Tensor, lengths: list[int], padded_lengths: list[int]) -> None:
    """Copy groups of rows to where there is room for more, which becomes zero."""
    for group, target in zip(rows.split(lengths), padded.split(padded_lengths), strict=True):
        target[: len(group)] = group
        target[len(group) :] = 0


def fused_multi_row_unpadding(padded: Tensor, rows: Tensor, padded_lengths: list[int], lengths: list[int]) -> None:
    for group, target in zip(padded.split(padded_lengths), rows.split(lengths), strict=True):
        target.copy_(group[: len(target)])


FUNCTIONS = (
    layernorm_fwd, layernorm_bwd, rmsnorm_fwd, rmsnorm_bwd, fused_rope_forward, fused_rope_backward,
    fused_multi_row_padding, fused_multi_row_unpadding,
)  # fmt: skip
