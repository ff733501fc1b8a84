"""Auxiliary losses of a mixture of experts, which measure how evenly tokens are spread: their weight and their log."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

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
    tokens, the micro-batches are read in advance. Without experts ``batches`` is returned unchanged.
    """
    if not _tags(model):
        return batches
    take_auxiliary_losses()  # discard those of a previous attempt at this step
    read = list(itertools.islice(batches, micro_batches)) if batches is not None else None
    tokens = torch.zeros(1, dtype=torch.float64, device=device.device())
    if read is not None and _counts_its_tokens():
        tokens += sum(float(batch["loss_mask"].sum()) for batch in read)
    dist.all_reduce(tokens)
    weigh_auxiliary_losses(tokens.item() / (micro_batches * parallel_state.get_data_parallel_world_size()))
    return iter(read) if read is not None else None


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
    """Return {Megatron-LM's tag: mean loss}, without coefficient, on every rank; empty without experts.

    The load balancing loss is E sum_e f_e P_e: E is the number of experts, f_e the fraction of tokens routed to expert
    e and P_e its mean probability; 1 means perfectly even. The mean is over layers, loops (each has its own auxiliary
    losses), micro-batches and data-parallel ranks; ranks that share a sequence hold partial sums. A collective.
    """
    tags = _tags(model)
    if not tags:
        return {}
    sums = take_auxiliary_losses()
    totals = device.on_device([sums.get(tag, 0.0) for tag in tags])
    dist.all_reduce(totals)
    count = model.expert_layers * micro_batches * parallel_state.get_data_parallel_world_size()
    return {tag: total / count for tag, total in zip(tags, totals.tolist(), strict=True)}
