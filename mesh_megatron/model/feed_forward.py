"""The feed-forward layer, with bias and exact GELU in one pass where there is a compiler."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.jit import jit_fuser
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class FeedForward(MLP):
    """As Megatron-Core's, whose own fused GELU is the tanh approximation."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[S, B, D] to [S, B, D], and the bias that whoever called adds to it."""
        if self.config.gated_linear_unit:
            return super().forward(hidden_states, *args, **kwargs)
        intermediate, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(F.gelu(intermediate) if bias is None else _bias_gelu(intermediate, bias))


@jit_fuser
def _bias_gelu(intermediate: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(intermediate + bias)
