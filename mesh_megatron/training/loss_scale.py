"""A dynamic loss scale that all sub-optimizers of a model share and that is the same on all ranks."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from torch import Tensor


class LossScale(DynamicGradScaler):
    """Megatron-Core's dynamic loss scale, updated once per step with the overflows of all sub-optimizers on all ranks.

    Megatron-Core gives each sub-optimizer of a chained optimizer (experts have their own, because they are sharded
    differently from dense layers) a scale that follows the gradients of that sub-optimizer only. These scales drift
    apart, while the loss is multiplied by just one of them.
    """

    def update(self, found_inf: bool) -> None:
        """Do nothing when one sub-optimizer reports: the next still has to divide its gradients by this scale."""

    def learn(self, overflow: bool) -> None:
        """Lower or raise the scale after a step; ``overflow`` if any rank found one in any sub-optimizer."""
        super().update(overflow)

    def state_dict(self) -> dict[str, Any]:
        """Return the state on the CPU: in checkpoints it would otherwise be restored on the GPU of the saving rank."""
        state = super().state_dict()
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state that may have been saved with another window or minimum scale; both are respected."""
        scale = state_dict["scale"].clamp(min=float(self.min_scale))
        steps = min(state_dict["growth_tracker"], self.growth_interval - 1)
        super().load_state_dict(state_dict | {"scale": scale, "growth_tracker": steps})


def share_loss_scale(optimizer: MegatronOptimizer) -> None:
    """Give all sub-optimizers the same ``LossScale``; do nothing without fp16 or with a constant scale."""
    config = optimizer.config
    if not config.fp16 or config.loss_scale is not None:
        return
    scale = LossScale(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )
    for sub_optimizer in optimizer.chained_optimizers:
        sub_optimizer.grad_scaler = scale


def shared_loss_scale(optimizer: MegatronOptimizer) -> LossScale | None:
    """Return the scale of all sub-optimizers; None if the loss is not scaled or scaled by a constant."""
    scale = getattr(optimizer.chained_optimizers[0], "grad_scaler", None)
    return scale if isinstance(scale, LossScale) else None
