"""AdamW through Megatron-Core, and one safe step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
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
from mesh_megatron.training.loss_scale import LossScale, share_loss_scale, shared_loss_scale


def build_optimizer(run: RunConfig, model: RankModel) -> MegatronOptimizer:
    """AdamW over this rank's parameters; biases and norms do not decay."""
    training = run.training
    config = OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=final_lr(training),
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=training.bf16,
        fp16=training.fp16,
        params_dtype=model.config.params_dtype,
        loss_scale=training.loss_scale,
        initial_loss_scale=training.initial_loss_scale,
        min_loss_scale=training.min_loss_scale,
        loss_scale_window=training.loss_scale_window,
        use_distributed_optimizer=run.parallel.use_distributed_optimizer,
        overlap_param_gather=run.parallel.overlap_param_gather,
    )
    rates = _router_rates(config, training.router_lr_mult)
    optimizer = get_megatron_optimizer(config, model.chunks, rates, use_gloo_process_groups=False)
    share_loss_scale(optimizer)
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _router_rates(config: OptimizerConfig, factor: float) -> dict[ParamKey, ParamGroupOverride] | None:
    """Parameter groups with learning rates of their own for the routers; None leaves Megatron-Core's groups."""
    if factor == 1:
        return None
    rates = ParamGroupOverride(max_lr=config.lr * factor, min_lr=config.min_lr * factor)
    return get_standard_config_overrides(config) | {ParamKey(name="*recurrence.router*"): rates}


def final_lr(training: TrainingConfig) -> float:
    return 0.1 * training.lr if training.min_lr is None else training.min_lr


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate of the last step, as ``Schedule.set_rates`` left it, of parameters that have no rate of their own."""
    return next((group["lr"] for group in optimizer.param_groups if group["max_lr"] == optimizer.config.lr), 0.0)


@dataclass(frozen=True)
class Update:
    """How one optimizer step ended."""

    grad_norm: float
    """Norm before clipping; NaN or infinite where that is what was found, NaN where nobody looked."""
    skipped: Literal["not finite", "overflow", "spike", "passed over"] | None = None
    """Why there was no update; "overflow" is that of a loss scale which can still fall."""
    stop: int | None = None
    """The largest of the ranks' reasons to stop, 0 for none; None where they were not asked."""

    @property
    def applied(self) -> bool:
        return self.skipped is None


@torch.no_grad()
def update_weights(optimizer: MegatronOptimizer, stop: int = 0) -> Update:
    """Clip and step; a gradient that is not finite leaves weights and optimizer state as they are.

    Megatron-Core checks for infinities only under a loss scale. Replicas look and compute the norm each for itself, so
    the ranks agree first: one whose memory fails must neither step alone nor leave others waiting for its norm. They
    agree on ``stop`` in the same all-reduce.
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
    """Whether the loss scale is above its minimum, so that an overflow is part of its search."""
    return float(scale.scale) > float(scale.min_scale)


def optimizer_parameters(optimizer: MegatronOptimizer) -> list[torch.nn.Parameter]:
    return [parameter for part in sub_optimizers(optimizer) for parameter in part.get_parameters()]
