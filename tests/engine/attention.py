"""Fused attention of ``transformer_engine_torch``, as cuDNN has it: for 16-bit numbers and causal masks."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.rounding import torch_type

NVTE_Fused_Attn_Backend = IntEnum(
    "NVTE_Fused_Attn_Backend", "NVTE_No_Backend NVTE_F16_max512_seqlen NVTE_F16_arbitrary_seqlen NVTE_FP8", start=-1
)


def get_fused_attn_backend(training: bool, query_type: Any, key_type: Any, *options: Any) -> Any:
    sixteen_bits = torch_type(query_type) in (torch.bfloat16, torch.float16)
    backends: Any = NVTE_Fused_Attn_Backend
    return backends.NVTE_F16_arbitrary_seqlen if sixteen_bits else backends.NVTE_No_Backend


def fused_attn_fwd(
    longest_query: int, longest_key: int, training: bool, scale: float, dropout: float, fast_zero_fill: bool,
    layout: str, bias_type: str, mask_type: str, softmax_type: str, window: Sequence[int], query_lengths: Tensor,
    key_lengths: Tensor, query: Tensor, key: Tensor, value: Tensor, *options: Any,
) -> list[Tensor]:  # fmt: skip
    """Return the result [S, B, H, d], and of what cuDNN keeps for the backward pass just the shapes."""
    assert mask_type == "NVTE_CAUSAL_MASK" and bias_type == "NVTE_NO_BIAS" and dropout == 0
    statistics = torch.empty(query.size(1), query.size(2), longest_query, 1)
    return [_attend(query, key, value, scale), statistics, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    longest_query: int, longest_key: int, scale: float, dropout: float, fast_zero_fill: bool, layout: str,
    bias_type: str, mask_type: str, softmax_type: str, window: Sequence[int], deterministic: bool,
    query_lengths: Tensor, key_lengths: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor,
    gradient: Tensor, *options: Any,
) -> list[Tensor | None]:  # fmt: skip
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    with torch.enable_grad():
        again = _attend(*leaves, scale)
    return [*torch.autograd.grad(again, leaves, gradient.view_as(again)), None, None]


def _attend(query_SBHd: Tensor, key_SBGd: Tensor, value_SBGd: Tensor, scale: float) -> Tensor:
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHd, key_SBGd, value_SBGd))
    result = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return result.permute(2, 0, 1, 3).contiguous()


FUNCTIONS = (NVTE_Fused_Attn_Backend, get_fused_attn_backend, fused_attn_fwd, fused_attn_bwd)
