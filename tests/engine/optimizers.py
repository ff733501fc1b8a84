"""Functions of ``transformer_engine_torch`` over lists of tensors: norms of gradients, scaling, Adam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DECOUPLED = 1  # weight decay apart from the gradient: AdamW


def multi_tensor_l2norm(
    chunk: int, found_inf: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(chunk: int, found_inf: Tensor, lists: Sequence[Sequence[Tensor]], factor: float) -> None:
    for source, target in zip(*lists, strict=True):
        if not source.isfinite().all():
            found_inf.fill_(1)
        target.copy_(source.float() * factor)


def multi_tensor_adam(
    chunk: int, found_inf: Tensor, lists: Sequence[Sequence[Tensor]], rate: float, beta1: float, beta2: float,
    eps: float, step: int, mode: int, bias_correction: int, decay: float,
) -> None:  # fmt: skip
    """Update parameters, averages, and where there are any their float32 copies."""
    assert mode == DECOUPLED and bias_correction
    for gradient, parameter, average, square, *copies in zip(*lists, strict=True):
        slope, master = gradient.float(), copies[0] if copies else parameter
        average.mul_(beta1).add_(slope, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
        change = (average / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
        master.sub_(rate * (change + decay * master))
        if copies:
            parameter.copy_(master)


FUNCTIONS = (multi_tensor_l2norm, multi_tensor_scale, multi_tensor_adam)
