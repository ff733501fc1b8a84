"""A constant tensor from a short description."""

from __future__ import annotations

import torch


def constant_tensor(values: float | tuple[float, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """Build a float32 tensor: a number goes on its diagonal, a tuple along its last axis (one value fills it)."""
    if isinstance(values, float):
        return torch.eye(*shape) * values
    return torch.tensor(values).expand(shape).clone()
