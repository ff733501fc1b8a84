"""How evenly a mixture of experts spreads its tokens: the auxiliary losses of a step, for the log."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state

from mesh_megatron.parallel.place import PlacedModel
from mesh_megatron.parallel.upstream import take_auxiliary_losses
from mesh_megatron.platform import device

_TAGS = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}


def mean_auxiliary_losses(model: PlacedModel, micro_batches: int) -> dict[str, float]:
    """By Megatron-LM's tag, E sum_e f_e P_e without its coefficient; the same on every rank, empty without experts.

    f_e is the share of tokens that expert e gets and P_e its mean probability: 1 is perfectly even. The mean is over
    layers, loops, micro-batches and data-parallel ranks (every loop has an auxiliary loss of its own); ranks that
    share a sequence hold parts of one value.
    """
    kind = model.config.moe_router_load_balancing_type
    if not model.expert_layers or kind not in _TAGS or not model.config.moe_aux_loss_coeff:
        return {}
    total = device.on_device(take_auxiliary_losses().get(_TAGS[kind], 0.0))
    dist.all_reduce(total)
    count = model.expert_layers * micro_batches * parallel_state.get_data_parallel_world_size()
    return {_TAGS[kind]: total.item() / count}
