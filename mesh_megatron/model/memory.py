"""MeSH's memory (Section 3.2), reading and writing M slots without ever building them.

Shapes: S positions, B sequences, D channels, M slots. ``sources`` are (h_emb, y_0, ..., y_c), each [S, B, D];
``writes`` are (w_0, ..., w_c) and ``read`` is r_c, each [S, B, M] in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mix(sources: Sequence[Tensor], writes: Sequence[Tensor], read: Tensor) -> Tensor:
    """The state after cycle c, s_{c+1} = r_0 h_emb + sum_i <r, w_i> y_i, as [S, B, D] in the sources' dtype.

    Every slot is a linear sum of what was written, so its weighted sum is one of the history: the history form of
    ``mix_slots``. Accumulated in float32, in the order of the history (float64 sources stay float64).
    """
    precision = _accumulation(sources[0].dtype)
    state_SBD = read[..., :1] * sources[0].to(precision)
    for output_SBD, write_SBM in zip(sources[1:], writes, strict=True):
        state_SBD = state_SBD + (read * write_SBM).sum(-1, keepdim=True) * output_SBD
    return state_SBD.to(sources[0].dtype)


def mix_slots(sources: Sequence[Tensor], writes: Sequence[Tensor], read: Tensor) -> Tensor:
    """The same in the paper's words, m_b = m_b + w_b y for every cycle, then s = sum_b r_b m_b.

    The specification: it holds M copies of [S, B, D] a cycle for the backward pass. Kept for tests and benchmarks.
    """
    precision = _accumulation(sources[0].dtype)
    embedding_SBD = sources[0].to(precision)
    slots = read.shape[-1]
    memory_SBMD = torch.stack([embedding_SBD] + [torch.zeros_like(embedding_SBD)] * (slots - 1), dim=-2)
    for output_SBD, write_SBM in zip(sources[1:], writes, strict=True):
        memory_SBMD = memory_SBMD + write_SBM.unsqueeze(-1) * output_SBD.to(precision).unsqueeze(-2)
    return (read.unsqueeze(-1) * memory_SBMD).sum(-2).to(sources[0].dtype)


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
