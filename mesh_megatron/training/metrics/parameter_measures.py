"""Measures of all parameters after a step: the norm of the weights and the number of zeros in the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from mesh_megatron.checkpoint.optimizer_state import sub_optimizers
from mesh_megatron.platform import device


@torch.no_grad()
def parameter_measures(optimizer: MegatronOptimizer, norm: bool, zeros: bool) -> dict[str, float]:
    """Return the measures asked for, by Megatron-LM's names, on every rank; a collective if there are any.

    To be called after an update, while the optimizer still has the gradients.
    """
    measures: dict[str, float] = {}
    if norm:
        measures["params-norm"] = math.sqrt(_total(optimizer, lambda weight: weight.double().square().sum()))
    if zeros:
        measures["num-zeros"] = round(_total(optimizer, _zeros_in_gradient))
    return measures


def _zeros_in_gradient(weight: Tensor) -> float:
    return 0 if weight.grad is None else weight.grad.numel() - int(torch.count_nonzero(weight.grad))


def _total(optimizer: MegatronOptimizer, measure: Callable[[Tensor], Tensor | float]) -> float:
    """Sum ``measure`` over the parameters of the model, each counted once however many ranks hold it.

    The ranks of an optimizer's group hold different parts; outside it there are copies of them.
    """
    total = torch.zeros(1, dtype=torch.float64, device=device.device())
    for part in sub_optimizers(optimizer):
        copies = dist.get_world_size() / dist.get_world_size(part.get_grad_stats_parallel_group())
        for weight in part.get_parameters():
            if param_is_not_shared(weight) and param_is_not_tensor_parallel_duplicate(weight):
                total += measure(weight) / copies
    dist.all_reduce(total)
    return total.item()
