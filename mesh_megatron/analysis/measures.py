"""Measures of the hidden states of one sequence (Figures 3 to 5), in float64; states are [S, D]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def update_magnitude(before_SD: Tensor, after_SD: Tensor) -> float:
    """Compute 2 |f(h) - h| / (|f(h)| + |h|) in Frobenius norms, from 0 (block f changes nothing) to 2 (Figure 3)."""
    before, after = before_SD.double(), after_SD.double()
    sizes = (after.norm() + before.norm()).item()
    return 2 * (after - before).norm().item() / sizes if sizes else 0.0


def root_mean_square_norm(state_SD: Tensor) -> float:
    """Compute |h|_F / sqrt(S), the root mean square over tokens of the norm of a state."""
    return (state_SD.double().norm() / len(state_SD) ** 0.5).item()


def singular_values(state_SD: Tensor, count: int = 50) -> Tensor:
    """Compute the ``count`` largest singular values (at most min(S, D)), divided by the largest (Figure 5).

    All are zero for a zero state.
    """
    values = torch.linalg.svdvals(state_SD.double())[:count]
    return values / values[0] if values[0] > 0 else values


def rbf_kernel(state_SD: Tensor) -> Tensor:
    """Compute exp(-|x_i - x_j|^2 / (2 sigma^2)), [S, S].

    sigma is the median distance over the pairs i < j (the lower median of an even number). If the median is 0, because
    most states are equal, sigma is the root mean square distance.
    """
    centred = state_SD.double()
    centred = centred - centred.mean(0)  # keeps the distances and minimises cancellation below
    gram = centred @ centred.T
    lengths = gram.diagonal()
    squares = (lengths[:, None] + lengths[None, :] - 2 * gram).clamp(min=0)
    row, column = torch.triu_indices(len(squares), len(squares), offset=1, device=squares.device)
    pairs = squares[row, column]
    scale = pairs.median() if pairs.median() > 0 else pairs.mean()
    return torch.exp(-squares / (2 * scale)) if scale > 0 else torch.ones_like(squares)


def centred_kernel(state_SD: Tensor) -> Tensor:
    """Compute H K H with H = I - 11^T / S, [S, S], of the RBF kernel K."""
    kernel = rbf_kernel(state_SD)
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def cka(states: Sequence[Tensor]) -> Tensor:
    """Compute the centred kernel alignment of every pair of n ``states``, [S, D] each: [n, n] (Figure 4).

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the biased estimate HSIC(K, L) = tr(K H L H) / (S - 1)^2 (Kornblith et
    al., 2019). The value is 0 for a state in which all tokens are equal.
    """
    kernels = torch.stack([centred_kernel(state).flatten() for state in states])
    products = kernels @ kernels.T
    sizes = products.diagonal().clamp(min=0).sqrt()
    return (products / (sizes[:, None] * sizes[None, :])).nan_to_num(0.0)


def entropy(weights: Tensor) -> Tensor:
    """Compute -sum p ln p over the last dimension, in nats: [..., M] to [...]; p is ``weights`` divided by their sum.

    Weights of sigmoid gates do not add up to one by themselves.
    """
    shares = weights.double()
    return torch.special.entr(shares / shares.sum(-1, keepdim=True)).sum(-1)
