"""Auxiliary losses of a mixture of experts and of mesh's routers: their weight and their log."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mesh_megatron.model.router_losses import RouterLosses
from mesh_megatron.parallel.build_model import RankModel
from mesh_megatron.parallel.groups import on_last_stage
from mesh_megatron.parallel.megatron_patches import take_auxiliary_losses, weigh_auxiliary_losses
from mesh_megatron.platform import device

Batch = dict[str, torch.Tensor]
_TAGS = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}


def weighed_micro_batches(
    model: RankModel, batches: Iterator[Batch] | None, micro_batches: int
) -> Iterator[Batch] | None:
    """Set the weight of the step's auxiliary losses and return its micro-batches; a collective.

    All gradients are later divided by the step's number of tokens with a loss. Auxiliary losses are therefore weighted
    by tokens / micro-batches, so that their mean over micro-batches and data-parallel ranks remains. To count the
    tokens, the micro-batches are read in advance. Without such losses ``batches`` is returned unchanged.
    """
    if not _tags(model) and not _router_tags(model):
        return batches
    take_auxiliary_losses()  # discard those of a previous attempt at this step
    RouterLosses.take()
    read = list(itertools.islice(batches, micro_batches)) if batches is not None else None
    tokens = torch.zeros(1, dtype=torch.float64, device=device.device())
    if read is not None and _counts_its_tokens():
        tokens += sum(float(batch["loss_mask"].sum()) for batch in read)
    dist.all_reduce(tokens)
    weight = tokens.item() / (micro_batches * parallel_state.get_data_parallel_world_size())
    weigh_auxiliary_losses(weight)
    if _router_tags(model):
        RouterLosses.weight = weight * _loss_scale(model)
    return iter(read) if read is not None else None


def _loss_scale(model: RankModel) -> float:
    """Return the factor of --fp16 on the loss, which Megatron-Core itself only applies to the losses of experts."""
    scale = model.config.grad_scale_func
    return 1.0 if scale is None else scale(torch.ones(1, device=device.device())).item()


def _router_tags(model: RankModel) -> dict[str, int]:
    """Return the log keys of the losses of mesh's routers, with their place in ``RouterLosses.take``.

    Where the exit gate alone learns there are none, for routers have no graph.
    """
    settings = model.modules[0].model
    if settings.exit_gate_only:
        return {}
    losses = ("router_z_loss", "router_entropy_loss")
    return {name: place for place, name in enumerate(losses) if getattr(settings, name)}


def _counts_its_tokens() -> bool:
    """Return whether this rank counts its micro-batches: one of the ranks that hold the same micro-batches does."""
    sharing = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank()
    return on_last_stage() and sharing == (0, 0)


def _tags(model: RankModel) -> list[str]:
    """Return the log keys of the model's auxiliary losses."""
    config = model.config
    if not model.expert_layers:
        return []
    balance = [_TAGS[config.moe_router_load_balancing_type]] if _balances(model) else []
    return balance + (["z_loss"] if config.moe_z_loss_coeff else [])


def _balances(model: RankModel) -> bool:
    return bool(model.config.moe_aux_loss_coeff) and model.config.moe_router_load_balancing_type in _TAGS


def mean_auxiliary_losses(model: RankModel, micro_batches: int) -> dict[str, float]:
    """Return {tag: mean loss}, without coefficient, of experts and of routers, on every rank; a collective."""
    return _mean_of_experts(model, micro_batches) | _mean_of_routers(model)


def _mean_of_routers(model: RankModel) -> dict[str, float]:
    """Return the mean over cycles, micro-batches and ranks; ranks that share a sequence hold means of their tokens."""
    tags = _router_tags(model)
    if not tags:
        return {}
    totals = device.on_device(list(RouterLosses.take()))
    dist.all_reduce(totals)
    *sums, count = totals.tolist()
    return {tag: sums[place] / count for tag, place in tags.items()}


def _mean_of_experts(model: RankModel, micro_batches: int) -> dict[str, float]:
    """Return {Megatron-LM's tag: mean loss}; empty without experts.

    The load balancing loss is E sum_e f_e P_e: E is the number of experts, f_e the fraction of tokens routed to expert
    e and P_e its mean probability; 1 means perfectly even. The mean is over layers, loops (each has its own auxiliary
    losses), micro-batches and data-parallel ranks; ranks that share a sequence hold partial sums.
    """
    tags = _tags(model)
    if not tags:
        return {}
    sums = take_auxiliary_losses()
    totals = device.on_device([sums.get(tag, 0.0) for tag in tags])
    dist.all_reduce(totals)
    count = model.expert_layers * micro_batches * parallel_state.get_data_parallel_world_size()
    return {tag: total / count for tag, total in zip(tags, totals.tolist(), strict=True)}
