"""Patches for differences between versions of Megatron-Core, faults in mixtures of experts, and slow gradient norms.

Each function patches one fault and names the version that fixes it. ``apply_patches`` runs once, before process groups
start. ``tests/distributed/test_moe_gaps.py`` omits each function and shows the consequence. On a version that has the
fix, a function does no harm.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from megatron.core import __version__, utils
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from packaging.version import Version
from torch import Tensor

VERSION = Version(__version__)


@functools.cache
def apply_patches() -> None:
    """Apply every patch; each is harmless where the installed version has the fix."""
    name_missing_gemm()
    hand_out_splits_as_numbers()
    let_experts_add_biases()
    reduce_experts_among_their_replicas()
    keep_biases_of_experts_apart()
    weigh_auxiliary_losses_as_asked()
    weigh_z_losses_as_asked()
    treat_gradients_all_at_once()
    drop_advice_to_other_callers()


def name_missing_gemm() -> None:
    """Define ``te_general_gemm``, which the router refers to and which exists only with Transformer Engine.

    Without the patch: NameError in the first forward pass. Fixed in 0.19.2.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def hand_out_splits_as_numbers() -> None:
    """Convert the split sizes of the all-to-all dispatcher to numpy on the CPU too, because c10d expects numbers.

    Without the patch: TypeError with experts split over CPU ranks. Not fixed as of 0.19.2, which tests only GPUs.
    """
    original = moe_utils.maybe_move_tensor_to_cpu

    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        tensor = original(tensor, as_numpy, record_stream)
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = move


def let_experts_add_biases() -> None:
    """Let experts add their bias in place without ETP.

    Their linear layers call a collective even if it has nothing to do, and it returns a view. Marked as communicating
    explicitly, they skip it. Without the patch: RuntimeError of autograd for experts with biases and neither EP nor
    ETP. Not fixed as of 0.19.2.
    """
    original = SequentialMLP.__init__

    @functools.wraps(original)
    def build(self: SequentialMLP, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.config.expert_tensor_parallel_size == 1:
            for expert in self.local_experts:
                expert.linear_fc1.explicit_expert_comm = expert.linear_fc2.explicit_expert_comm = True

    SequentialMLP.__init__ = build


def reduce_experts_among_their_replicas() -> None:
    """Reduce the gradients of experts over all of their replicas, also those on tensor-parallel ranks (ETP below TP).

    Each replica sees different tokens, but without EP Megatron-Core sums their gradients like a dense layer's, over
    data-parallel ranks only. Without the patch: replicas diverge silently. Fixed in 0.19.2.
    """
    original = MoELayer.__init__

    @functools.wraps(original)
    def build(self: MoELayer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.config.expert_tensor_parallel_size != self.config.tensor_model_parallel_size:
            for parameter in self.experts.parameters():
                parameter.allreduce = False  # makes Megatron-Core reduce it over expert-data-parallel ranks

    MoELayer.__init__ = build


def keep_biases_of_experts_apart() -> None:
    """Keep biases of different experts separate: Megatron-Core takes them for replicas on every tensor-parallel rank.

    Without the patch, with TP and ETP 1, silently: gradients of different experts are summed, and the gradient norm
    omits those of all but one rank. Not fixed as of 0.19.2.
    """
    original = MoELayer.__init__

    @functools.wraps(original)
    def build(self: MoELayer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for parameter in self.experts.parameters():
            parameter.sequence_parallel = False
            parameter.tensor_model_parallel = True  # like the weights: counted on every rank

    MoELayer.__init__ = build


def weigh_auxiliary_losses_as_asked() -> None:
    """Correct the weight of the auxiliary losses of routers.

    A router multiplies its auxiliary loss by the number of tokens it sees, but the gradient is divided by the number of
    tokens with a loss. Without the patch, silently: the loss is too strong by the share of masked tokens. Not fixed as
    of 0.19.2. Before 0.19 it is also too weak: if ranks share a sequence (TP, CP), only one rank's tokens count, and
    with seq_aux_loss only those of one sequence.
    """
    original = TopKRouter.attach_and_log_load_balancing_loss

    @functools.wraps(original)
    def attach(self: TopKRouter, *args: Any, **kwargs: Any) -> Tensor:
        factor = self.tp_cp_group.size() if Version("0.19") <= VERSION else 1  # the router multiplies the loss by it
        return original(self, *args, **kwargs | {"valid_token_count": _AuxiliaryLosses.weight / factor})

    TopKRouter.attach_and_log_load_balancing_loss = attach


def weigh_z_losses_as_asked() -> None:
    """Give the z-loss of routers the same weight as their other auxiliary losses, and sum it for the log.

    Without the patch, silently: the loss is too strong by the share of masked tokens. Not fixed as of 0.19.2.
    """

    def apply_z_loss(self: TopKRouter, logits: Tensor, *_: Any, **__: Any) -> Tensor:
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self.training or not torch.is_grad_enabled():
            return logits
        share = logits.logsumexp(-1).square().mean() / self.tp_cp_group.size()  # of ranks that share the sequences
        _AuxiliaryLosses.z_loss = _AuxiliaryLosses.z_loss + share.detach()
        return moe_utils.MoEAuxLossAutoScaler.apply(logits, share * coefficient * _AuxiliaryLosses.weight)

    TopKRouter.apply_z_loss = apply_z_loss


class _AuxiliaryLosses:
    """The weight of auxiliary losses, shared by every router of this process, and the sum of its z-losses."""

    weight = 1.0
    z_loss: Tensor | float = 0.0


def weigh_auxiliary_losses(weight: float) -> None:
    """Set the ``weight`` with which every router adds its auxiliary loss per micro-batch to the summed loss."""
    _AuxiliaryLosses.weight = weight


def treat_gradients_all_at_once() -> None:
    """Without Transformer Engine and apex the host reads the norm of every gradient, and clips them one by one.

    Without it: hundreds of times in a step the host waits for the GPU. Not changed as of 0.19.2.
    """
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = norm_of_all
    for module in (clip_grads, optimizer):
        if module.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
            module.multi_tensor_scale_impl = scale_all


def drop_advice_to_other_callers() -> None:
    """Drop warnings with which every rank of every run would advise what is done here in another way.

    0.19 advises to compute the layout of the distributed optimizer before the wrapper does the same, and calls its
    asynchronous writer deprecated, of which only planning is used here (``checkpoint/megatron_writer.py``).
    """
    for module, start in _ADVICE.items():
        logging.getLogger(f"megatron.core.{module}").addFilter(functools.partial(_is_other_than, start))


def _is_other_than(start: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(start)


_ADVICE = {
    "distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}


def norm_of_all(chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """The L2 norm [1] of the tensors in ``lists`` as one vector; called as apex's function of that use is."""
    norms = torch._foreach_norm([tensor for tensors in lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(norms)).float().view(1), None


def scale_all(chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    """Write the first list's tensors, times ``scale``, into the second's; called as apex's function of that use is."""
    sources, targets = lists
    if any(source is not target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_copy_(targets, sources)
    if scale != 1:
        torch._foreach_mul_(targets, scale)


def take_auxiliary_losses() -> dict[str, float]:
    """Return this rank's sums of auxiliary losses since the last call, by Megatron-Core's name, and reset them.

    Each sums over this rank's layers, loops, micro-batches and tokens, without its coefficient. Megatron-Core stores
    them in another place after 0.16.
    """
    z_loss, _AuxiliaryLosses.z_loss = float(_AuxiliaryLosses.z_loss), 0.0
    try:
        from megatron.core.transformer.moe import moe_logging
    except ImportError:
        tracker = moe_utils.get_moe_layer_wise_logging_tracker()
        sums = {name: entry["values"].sum().item() for name, entry in tracker.items()}
        tracker.clear()
        return sums | {"z_loss": z_loss}
    metrics = moe_logging.get_moe_metrics_tracker().metrics
    sums = {name: entry.values.sum().item() for name, entry in metrics.items()}
    moe_logging.destroy_moe_metrics_tracker()
    return sums | {"z_loss": z_loss}
