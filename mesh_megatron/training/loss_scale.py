"""One dynamic loss scale for a model, in however many parts its optimizer and on however many ranks it is."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from torch import Tensor


class LossScale(DynamicGradScaler):
    """Megatron-Core's dynamic loss scale, told once a step what all parts of the optimizer on all ranks found.

    Megatron-Core gives each part of a chained optimizer (one holds what is not split like the dense layers: experts) a
    scale that hears of that part's gradients only. They drift apart, while the loss is multiplied by one of them.
    """

    def update(self, found_inf: bool) -> None:
        """Change nothing: one part says what it found, and the next still divides its gradients by this scale."""

    def learn(self, overflow: bool) -> None:
        """Fall or rise after a step, by what was found anywhere."""
        super().update(overflow)

    def state_dict(self) -> dict[str, Any]:
        """On the CPU: plain values travel between ranks as they are, and would come out on their own rank's GPU."""
        state = super().state_dict()
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where another run stood, whose window or least scale may have been another."""
        scale = state_dict["scale"].clamp(min=float(self.min_scale))
        steps = min(state_dict["growth_tracker"], self.growth_interval - 1)
        super().load_state_dict(state_dict | {"scale": scale, "growth_tracker": steps})


def share_loss_scale(optimizer: MegatronOptimizer) -> None:
    """Give every part of the optimizer one and the same loss scale, if it is dynamic."""
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
    for part in optimizer.chained_optimizers:
        part.grad_scaler = scale


def shared_loss_scale(optimizer: MegatronOptimizer) -> LossScale | None:
    """The scale of all parts; None if the loss is not scaled or by a constant."""
    scale = getattr(optimizer.chained_optimizers[0], "grad_scaler", None)
    return scale if isinstance(scale, LossScale) else None
