"""Losses and gradients of a chunk in plain torch; ``cross_entropy_triton.py`` has the same functions in Triton.

On a CPU both process the logits of a few tokens at a time, so that these stay in the processor's cache and only they
are converted to float32. On a GPU they process a chunk at once, to avoid the launch of thousands of small operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS_OF_CPU = 16
"""Number of tokens whose logits a CPU reads or writes at a time."""


def statistics(logits_CV: Tensor, rows_C: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the log-sum-exp [C] of the logits, and the logit [C] in column ``rows_C`` (0 if outside of 0..V-1)."""
    columns_C, inside = _columns(rows_C, logits_CV.shape[1])
    normalizer = torch.cat([logits.float().logsumexp(1) for logits in logits_CV.split(_tokens_at_once(logits_CV))])
    return normalizer, logits_CV.gather(1, columns_C).squeeze(1).float() * inside


def gradient(logits_CV: Tensor, rows_C: Tensor, normalizer_C: Tensor, weights_C: Tensor) -> Tensor:
    """Compute the gradient [C, V] of the weighted sum of losses, in place of the logits and in their dtype."""
    columns_C, inside = _columns(rows_C, logits_CV.shape[1])
    of_label = (inside * weights_C).unsqueeze(1)
    of_tokens = (logits_CV, normalizer_C.unsqueeze(1), weights_C.unsqueeze(1), columns_C, of_label)
    at_once = _tokens_at_once(logits_CV)
    parts = zip(*(tensor.split(at_once) for tensor in of_tokens), strict=True)
    for logits, normalizer, weights, columns, label in parts:
        probabilities = logits.float().sub_(normalizer).exp_().mul_(weights)
        logits.copy_(probabilities.scatter_add_(1, columns, -label))
    return logits_CV


def _tokens_at_once(logits_CV: Tensor) -> int:
    return TOKENS_OF_CPU if logits_CV.device.type == "cpu" else len(logits_CV)


def _columns(rows_C: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return ``rows_C`` as an index [C, 1], 0 where it is out of range, and the mask of those in range."""
    inside = (rows_C >= 0) & (rows_C < width)
    return rows_C.where(inside, 0).unsqueeze(1), inside
