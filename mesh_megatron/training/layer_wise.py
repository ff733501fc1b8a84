"""Optimizer state split over data-parallel ranks by complete parameters, as Muon needs it.

Muon orthogonalises complete matrices, so the slices of Megatron-Core's distributed optimizer do not fit it. Here every
rank has all reduced gradients, updates the parameters that it owns, and broadcasts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mesh_megatron.parallel.build_model import RankModel

Share = list[nn.Parameter]


class LayerWiseOptimizer(ChainedOptimizer):
    """Sub-optimizers of the parameters that this rank owns; after an update all ranks receive all parameters."""

    def __init__(self, owned: ChainedOptimizer, shares: dict[dist.ProcessGroup, list[Share]]) -> None:
        """``shares`` holds, for each group of replicas, the parameters that each of its ranks owns."""
        super().__init__(owned.chained_optimizers)
        self.shares = shares
        for part in self.chained_optimizers:
            part.grad_stats_parallel_group = dist.group.WORLD  # all ranks own different parameters
            part.owns_parameters = True  # checkpoint/optimizer_state.py

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Update the owned parameters, then receive all others from their owners."""
        stepped = super().step_with_ready_grads()
        for group, shares in self.shares.items():
            for owner, share in enumerate(shares):
                _broadcast(share, owner, group)
        return stepped


def build_layer_wise(model: RankModel, build: Callable[[], ChainedOptimizer]) -> LayerWiseOptimizer:
    """Return what ``build`` returns, restricted to this rank's share of the model's parameters.

    Of more ranks than parameters some own nothing; they only receive what the others have updated.
    """
    shares = {
        group: _shares(parameters, group.size()) for group, parameters in _by_replicas(model).items() if parameters
    }
    owned = [parameter for group, all_shares in shares.items() for parameter in all_shares[group.rank()]]
    with _only_trained(owned, model):
        optimizer = build()
    return LayerWiseOptimizer(optimizer, shares)


def _by_replicas(model: RankModel) -> dict[dist.ProcessGroup, Share]:
    """Group this rank's parameters by the ranks that hold copies of them."""
    dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
    experts = parallel_state.get_expert_data_parallel_group()
    found: dict[dist.ProcessGroup, Share] = {dense: []}
    for module in model.modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                group = dense if getattr(parameter, "allreduce", True) else experts
                found.setdefault(group, []).append(parameter)
    return found


def _shares(parameters: Share, ranks: int) -> list[Share]:
    """Divide ``parameters`` among ``ranks``: the largest first, each to the rank that has least."""
    shares: list[Share] = [[] for _ in range(ranks)]
    held = [0] * ranks
    for parameter in sorted(parameters, key=lambda each: -each.numel()):
        least = held.index(min(held))
        shares[least].append(parameter)
        held[least] += parameter.numel()
    return shares


@contextmanager
def _only_trained(parameters: Share, model: RankModel) -> Iterator[None]:
    """Freeze all parameters but these, so that optimizers leave them out."""
    owned = {id(parameter) for parameter in parameters}
    trained = [each for module in model.modules for each in module.parameters() if each.requires_grad]
    others = [each for each in trained if id(each) not in owned]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _broadcast(share: Iterable[nn.Parameter], owner: int, group: dist.ProcessGroup) -> None:
    """Send the parameters of ``owner`` to the other ranks of ``group``, those of one dtype at once."""
    by_dtype: dict[torch.dtype, Share] = {}
    for parameter in share:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for parameters in by_dtype.values():
        flat = _flatten_dense_tensors([parameter.data for parameter in parameters])
        dist.broadcast(flat, group=group, group_src=owner)
        if group.rank() != owner:
            for parameter, new in zip(parameters, _unflatten_dense_tensors(flat, parameters), strict=True):
                parameter.data.copy_(new)
