"""Losses and gradients of a chunk in Triton, directly from the stored logits: without a float32 copy of them.

``cross_entropy_torch.py`` has the same functions in plain torch. A program processes one token; sums are float32 in a
fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 2048
"""Columns of a program's tile."""


def statistics(logits_CV: Tensor, rows_C: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``cross_entropy_torch.statistics`` in one pass over the logits."""
    count, width = logits_CV.shape
    normalizer, target = torch.empty(2, count, dtype=torch.float32, device=logits_CV.device)
    _statistics_kernel[(count,)](logits_CV, logits_CV.stride(0), rows_C, normalizer, target, width, COLUMNS=COLUMNS)
    return normalizer, target


def gradient(logits_CV: Tensor, rows_C: Tensor, normalizer_C: Tensor, weights_C: Tensor) -> Tensor:
    """Compute ``cross_entropy_torch.gradient`` in place, for every dtype."""
    count, width = logits_CV.shape
    _gradient_kernel[(count, triton.cdiv(width, COLUMNS))](
        logits_CV, logits_CV.stride(0), rows_C, normalizer_C, weights_C, width, COLUMNS=COLUMNS
    )
    return logits_CV


@triton.jit
def _statistics_kernel(logits, stride, rows, normalizer, target, width, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + token)
    # Every lane keeps its own maximum and sum. The initial maximum is finite: infinities would cancel to NaN.
    highest = tl.full([COLUMNS], -3e38, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = tl.load(logits + token * stride + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        above = x - highest
        power = tl.exp(-tl.abs(above))  # exp(lower - higher) of x and the maximum
        total = tl.where(above > 0, total * power + 1.0, total + power)
        highest = tl.maximum(highest, x)
    top = tl.max(highest, 0)
    tl.store(normalizer + token, top + tl.log(tl.sum(total * tl.exp(highest - top), 0)))
    own = tl.load(logits + token * stride + row, mask=(row >= 0) & (row < width), other=0.0)
    tl.store(target + token, own.to(tl.float32))


@triton.jit
def _gradient_kernel(logits, stride, rows, normalizer, weights, width, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = logits + token * stride + columns
    x = tl.load(place, mask=columns < width, other=0.0).to(tl.float32)
    probability = tl.exp(x - tl.load(normalizer + token))
    is_label = tl.where(columns == tl.load(rows + token), 1.0, 0.0)
    value = (probability - is_label) * tl.load(weights + token)
    tl.store(place, value.to(logits.dtype.element_ty), mask=columns < width)
