"""A constant tensor from a short description."""

from __future__ import annotations

from typing import Literal

import torch


def constant_tensor(values: Literal["identity"] | tuple[float, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """Build a float32 tensor with ones on its diagonal, or with ``values`` along its last axis (one value fills it)."""
    if values == "identity":
        return torch.eye(*shape)
    return torch.tensor(values).expand(shape).clone()
