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


def fused_attn_fwd(longest: int, _longest_key: int, _training: bool, scale: float, *options: Any) -> list[Tensor]:
    """Return the result [S, B, H, d], and of what cuDNN keeps for the backward pass just the shapes.

    What follows in ``options`` differs between versions; tensors keep their order.
    """
    names = {option for option in options if isinstance(option, str)}
    dropout = options[0]
    assert {"NVTE_CAUSAL_MASK", "NVTE_NO_BIAS"} <= names and dropout == 0
    query, key, value = _tensors(options)[2:5]  # after the lengths of sequences
    statistics = torch.empty(query.size(1), query.size(2), longest, 1)
    return [_attend(query, key, value, scale), statistics, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(_longest: int, _longest_key: int, scale: float, *options: Any) -> list[Tensor | None]:
    query, key, value, _result, gradient = _tensors(options)[2:7]
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    with torch.enable_grad():
        again = _attend(*leaves, scale)
    return [*torch.autograd.grad(again, leaves, gradient.view_as(again)), None, None]


def _tensors(options: Sequence[Any]) -> list[Tensor]:
    return [option for option in options if isinstance(option, Tensor)]


def _attend(query_SBHd: Tensor, key_SBGd: Tensor, value_SBGd: Tensor, scale: float) -> Tensor:
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHd, key_SBGd, value_SBGd))
    result = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return result.permute(2, 0, 1, 3).contiguous()


FUNCTIONS = (NVTE_Fused_Attn_Backend, get_fused_attn_backend, fused_attn_fwd, fused_attn_bwd)
