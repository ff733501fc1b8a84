"""AdamW through Megatron-Core, alone or beside Muon, and an update that skips gradients which are not finite."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    ParamWithNamePredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from mesh_megatron.checkpoint.optimizer_state import sub_optimizers
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.parallel.build_model import RankModel
from mesh_megatron.parallel.collectives import largest_of_each
from mesh_megatron.parallel.fully_sharded import FullyShardedModel, held_part
from mesh_megatron.training.layer_wise import build_layer_wise
from mesh_megatron.training.loss_scale import LossScale, share_loss_scale, shared_loss_scale
from mesh_megatron.training.muon import GROUP, layer_matrices, use_muon

_ENDS = ("embedding.word_embeddings.weight", "output_layer.weight")
_VECTORS_OF_LOOPS = ("*layernorm.weight", "*recurrence.loop_embedding.weight")
"""Parameters that may hold a vector per loop, [K, D]; without weight decay like other vectors."""


def build_optimizer(run: RunConfig, model: RankModel) -> MegatronOptimizer:
    """Return the optimizer of this rank's parameters, without weight decay for biases, norms and vectors."""
    training = run.training
    muon = training.optimizer == "muon"
    config = OptimizerConfig(
        optimizer="sgd" if training.optimizer == "sgd" else "adam",
        sgd_momentum=training.sgd_momentum,
        lr=training.lr,
        min_lr=final_lr(training),
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=training.bf16 and not run.parallel.use_torch_fsdp2,  # whose parameters are the main weights
        fp16=training.fp16,
        params_dtype=model.config.params_dtype,
        loss_scale=training.loss_scale,
        initial_loss_scale=training.initial_loss_scale,
        min_loss_scale=training.min_loss_scale,
        loss_scale_window=training.loss_scale_window,
        use_distributed_optimizer=run.slices_optimizer,
        overlap_param_gather=run.parallel.overlap_param_gather,
    )
    matrices = layer_matrices(model, run.model, not training.muon_no_split_qkv) if muon else {}
    groups = _groups(config, training, matrices)
    build = partial(get_megatron_optimizer, config, model.chunks, groups, use_gloo_process_groups=False)
    optimizer = build_layer_wise(model, build) if muon and run.parallel.use_distributed_optimizer else build()
    if muon:
        use_muon(optimizer, matrices, training)
    for chunk in model.chunks:
        if isinstance(chunk, FullyShardedModel):
            _use_slices(optimizer)
    share_loss_scale(optimizer)
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _use_slices(optimizer: MegatronOptimizer) -> None:
    """Let the optimizer update this rank's slices in place of fully sharded parameters."""
    for part in sub_optimizers(optimizer):
        part.sharded = {held_part(parameter): parameter for parameter in part.get_parameters()}
        for group in part.optimizer.param_groups:
            group["params"] = [held_part(parameter) for parameter in group["params"]]
        part.grad_stats_parallel_group = torch.distributed.group.WORLD


def _groups(
    config: OptimizerConfig, training: TrainingConfig, matrices: Collection[torch.Tensor]
) -> dict[ParamKey, ParamGroupOverride]:
    """Return parameter groups other than the default: ``matrices`` for Muon, rates of their own, no weight decay.

    Rates of their own have routers, embedding and output, and beside Muon all that AdamW updates.
    """
    scalar_lr = training.lr if training.muon_scalar_lr is None else training.muon_scalar_lr
    scalar = ParamGroupOverride(max_lr=scalar_lr, min_lr=config.min_lr * scalar_lr / config.lr)
    router = ParamGroupOverride({name: rate * training.router_lr_mult for name, rate in scalar.items()})
    ends = scalar
    if training.decoupled_lr is not None:
        least = training.decoupled_min_lr
        in_proportion = config.min_lr * training.decoupled_lr / config.lr
        ends = ParamGroupOverride(max_lr=training.decoupled_lr, min_lr=in_proportion if least is None else least)

    def kind(parameter: torch.Tensor, name: str) -> str:
        if parameter in matrices:
            return "matrix"
        if fnmatchcase(name, "*recurrence.router*"):
            return "router"
        return "ends" if name.endswith(_ENDS) else "scalar"

    wanted = {"matrix": ParamGroupOverride({GROUP: True}), "router": router, "ends": ends, "scalar": scalar}
    default = {"max_lr": config.lr, "min_lr": config.min_lr}
    own = {
        ParamKey(with_name_predicate=ParamWithNamePredicate(each, lambda *of, each=each: kind(*of) == each)): group
        for each, group in wanted.items()
        if group != default and (each != "matrix" or matrices)
    }
    if training.router_wd_mult != 1:
        own[ParamKey(name="*recurrence.router*.weight")] = ParamGroupOverride(wd_mult=training.router_wd_mult)
    own |= {ParamKey(name=each): ParamGroupOverride(wd_mult=0.0) for each in _VECTORS_OF_LOOPS}
    return get_standard_config_overrides(config) | own


def final_lr(training: TrainingConfig) -> float:
    """Return ``--min-lr``, or a tenth of ``--lr`` if it is not given."""
    return 0.1 * training.lr if training.min_lr is None else training.min_lr


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """Return the rate that ``Schedule.set_rates`` has set, for parameters without a multiplier of their own."""
    return next((group["lr"] for group in optimizer.param_groups if group["max_lr"] == optimizer.config.lr), 0.0)


@dataclass(frozen=True)
class Update:
    """The outcome of one optimizer step."""

    grad_norm: float
    """Norm before clipping; may be NaN or infinite. NaN if it was not computed."""
    skipped: Literal["not finite", "overflow", "spike", "passed over"] | None = None
    """Why weights were not updated; "overflow" only while the loss scale can still be lowered."""
    stop: int | None = None
    """The largest of the ranks' reasons to stop, 0 for none; None if they were not asked."""

    @property
    def applied(self) -> bool:
        """True if weights were updated."""
        return self.skipped is None


@torch.no_grad()
def update_weights(optimizer: MegatronOptimizer, stop: int = 0) -> Update:
    """Clip the gradients and update; with a gradient that is not finite leave weights and optimizer state unchanged.

    Megatron-Core checks for infinities only under a loss scale. Each replica checks its gradients and computes the norm
    itself, so the ranks first agree on the result: a rank with faulty memory must neither skip the update alone nor
    leave the others waiting in a collective. They agree on ``stop`` in the same all-reduce.
    """
    overflow = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    overflow, infinite, not_a_number, stop = largest_of_each([overflow, math.isinf(norm), math.isnan(norm), stop])
    if (scale := shared_loss_scale(optimizer)) is not None:
        searching = overflow and _can_fall(scale)
        scale.learn(bool(overflow))
        if searching:
            return Update(math.inf, "overflow", stop)
    if overflow or infinite or not_a_number:
        return Update(math.nan if not_a_number and not overflow else math.inf, "not finite", stop)
    clip = optimizer.config.clip_grad
    if clip > 0:
        parameters = optimizer_parameters(optimizer)
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=norm)
    stepped = optimizer.step_with_ready_grads()
    assert stepped, "only gradients that are not finite keep an optimizer from stepping"
    return Update(norm, stop=stop)


def _can_fall(scale: LossScale) -> bool:
    """Return whether the loss scale is above its minimum, so that an overflow only lowers it."""
    return (scale.scale > scale.min_scale).item()


def optimizer_parameters(optimizer: MegatronOptimizer) -> list[torch.nn.Parameter]:
    """Return the parameters of all sub-optimizers on this rank."""
    return [parameter for each in sub_optimizers(optimizer) for parameter in each.get_parameters()]
