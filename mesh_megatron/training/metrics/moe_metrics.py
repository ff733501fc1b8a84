"""How evenly a mixture of experts spreads its tokens: the auxiliary losses of a step, their weight and the log."""

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
    """``batches``, read ahead for a step so that its auxiliary losses are weighed; the same without experts.

    Gradients are divided by the step's tokens with a loss, however they spread over micro-batches and ranks. Multiplied
    by as many, divided by the number of micro-batches, auxiliary losses come out as their mean: what is logged below.
    """
    if _tag(model) is None:
        return batches
    take_auxiliary_losses()  # of an attempt that does not count
    read = list(itertools.islice(batches, micro_batches)) if batches is not None else None
    tokens = torch.zeros(1, dtype=torch.float64, device=device.device())
    if read is not None and _counts_its_tokens():
        tokens += sum(float(batch["loss_mask"].sum()) for batch in read)
    dist.all_reduce(tokens)
    weigh_auxiliary_losses(float(tokens) / (micro_batches * parallel_state.get_data_parallel_world_size()))
    return iter(read) if read is not None else None


def _counts_its_tokens() -> bool:
    """Whether this rank is the one that speaks for its micro-batches."""
    sharing = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank()
    return on_last_stage() and sharing == (0, 0)


def _tag(model: RankModel) -> str | None:
    """What the log calls the model's auxiliary losses; None if it has none."""
    if not model.expert_layers or not model.config.moe_aux_loss_coeff:
        return None
    return _TAGS.get(model.config.moe_router_load_balancing_type)


def mean_auxiliary_losses(model: RankModel, micro_batches: int) -> dict[str, float]:
    """By Megatron-LM's tag, E sum_e f_e P_e without its coefficient; the same on every rank, empty without experts.

    f_e is the share of tokens that expert e gets and P_e its mean probability: 1 is perfectly even. The mean is over
    layers, loops, micro-batches and data-parallel ranks (every loop has an auxiliary loss of its own); ranks that
    share a sequence hold parts of one value.
    """
    if (tag := _tag(model)) is None:
        return {}
    total = device.on_device(take_auxiliary_losses().get(tag, 0.0))
    dist.all_reduce(total)
    count = model.expert_layers * micro_batches * parallel_state.get_data_parallel_world_size()
    return {tag: total.item() / count}
