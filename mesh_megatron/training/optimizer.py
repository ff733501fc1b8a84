"""AdamW through Megatron-Core, its learning-rate schedule, and one safe step."""

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
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.parallel.place import PlacedModel
from mesh_megatron.training.agreement import largest_of_each
from mesh_megatron.training.length import Length


def build_optimizer(run: RunConfig, model: PlacedModel) -> MegatronOptimizer:
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


def build_schedule(
    run: RunConfig, optimizer: MegatronOptimizer, world_size: int, length: Length
) -> OptimizerParamScheduler:
    """Warmup and decay, counted in sequences so that batch ramp-up does not bend the curve; stands where ``length``
    starts."""
    training, total = run.training, length.total_iters
    batch = training.batch_size(run.parallel.data_parallel_size(world_size))

    def samples(iterations: int) -> int:
        return training.samples_after(iterations, batch)

    end = training.lr_decay_iters or total
    counts_steps = training.lr_decay_iters is not None or training.train_iters is not None
    decay = max(samples(end) if counts_steps else length.total_samples, 1)
    if training.lr_warmup_samples is not None:
        warmup = training.lr_warmup_samples
    elif training.lr_warmup_iters is not None:
        warmup = _sequences_of_warmup(training.lr_warmup_iters, training, batch, length)
    else:
        warmup = int(decay * (0.01 if training.lr_warmup_fraction is None else training.lr_warmup_fraction))
    if warmup >= decay:
        raise ValueError(
            f"the learning rate warms up over {warmup} sequences but decays over {decay}: lower --lr-warmup-iters, "
            "-samples or -fraction, or raise --lr-decay-iters"
        )
    final = training.lr_wsd_decay_iters or max(total // 10, 1)
    wsd = samples(end) - samples(end - final)
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=final_lr(training),
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=max(total, 1),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=wsd if training.lr_decay_style == "WSD" else None,
        lr_wsd_decay_style=training.lr_wsd_decay_style,
    )
    schedule.step(increment=length.schedule_position)
    return schedule


def _sequences_of_warmup(steps: int, training: TrainingConfig, batch: int, length: Length) -> int:
    """Where on the schedule the first ``steps`` steps end; those before ``length`` may have had other batches."""
    if length.schedule_position == training.samples_after(length.iteration, batch):
        return training.samples_after(steps, batch)
    if steps > length.iteration:
        return training.samples_after(steps - length.iteration, batch, length.schedule_position)
    return steps * length.schedule_position // length.iteration


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate of the last step, of parameters that have no rate of their own."""
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

    Megatron-Core checks for infinities only under a loss scale. Replicas compute the norm each for itself, so the
    ranks agree first: one whose memory fails must not step alone. They agree on ``stop`` in the same breath.
    """
    scale_can_fall = optimizer.config.fp16 and _scale_can_fall(optimizer)
    overflow = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm()) if not overflow else math.inf
    overflow, infinite, not_a_number, stop = largest_of_each([overflow, math.isinf(norm), math.isnan(norm), stop])
    if overflow and scale_can_fall:
        return Update(math.inf, "overflow", stop)
    if infinite or not_a_number:
        return Update(math.nan if not_a_number else math.inf, "not finite", stop)
    clip = optimizer.config.clip_grad
    if clip > 0:
        parameters = optimizer_parameters(optimizer)
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=norm)
    stepped = optimizer.step_with_ready_grads()
    assert stepped, "only gradients that are not finite keep an optimizer from stepping"
    return Update(norm, stop=stop)


def _scale_can_fall(optimizer: MegatronOptimizer) -> bool:
    """Whether the loss scale is dynamic and above its minimum, so that an overflow is part of its search."""
    config = optimizer.config
    return config.loss_scale is None and optimizer.get_loss_scale().item() > config.min_loss_scale


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that Megatron-Core chained (one for dense, one for expert parameters), without empty ones."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if not part.is_stub_optimizer]


def optimizer_parameters(optimizer: MegatronOptimizer) -> list[torch.nn.Parameter]:
    return [parameter for part in parts(optimizer) for parameter in part.get_parameters()]
