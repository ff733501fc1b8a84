"""A normal random tensor as a function of a seed and a name."""

from __future__ import annotations

import hashlib

import torch


def normal_tensor(seed: int, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Draw a float32 tensor from N(0, ``std``) on the CPU; the same seed, name and shape give the same numbers."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
