"""One matrix product and one all-gather of the sequence for both branches of a parallel residual.

With sequence parallelism each branch's first linear layer gathers its own norm's output, forward and again backward.
But the two norms differ only in scale and shift: for the normalised state x^, W (g x^ + h) + b = (W diag(g)) x^ +
(W h + b). So x^ is gathered once and multiplied with both scaled weights, stacked; its gradient is
reduce-scattered once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import CheckpointWithoutOutput, ColumnParallelLinear
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from mesh_megatron.model.norm import LayerNorm, RMSNorm


class Affine(NamedTuple):
    """Affine map of a norm after normalising (scale, shift), or of a linear layer (weight, bias)."""

    scale: Tensor
    shift: Tensor | None


class ProjectionWithBias(ColumnParallelLinear):
    """A column-parallel linear layer whose matrix product adds the bias, at no extra cost.

    Megatron-Core adds the bias in a separate pass over the widest tensors of a layer, or leaves that to the caller. Its
    own product is still used with tensor parallelism, because it overlaps communication, and with gradient accumulation
    fusion.
    """

    def forward(self, input_: Any, *args: Any, **kwargs: Any) -> Any:
        """Return [S, B, columns of this rank], and the bias if the caller must add it (else None)."""
        if self.bias is None or self.tp_group.size() > 1 or self.gradient_accumulation_fusion:
            return super().forward(input_, *args, **kwargs)
        return F.linear(input_, self.weight, self.bias), None


class SharedProjection(ProjectionWithBias):
    """A column-parallel linear layer that shares one product with the other branch under sequence parallelism.

    ``project_together`` calls it with its norm's ``Affine`` and gets the composed affine map of norm and layer. Then
    Megatron-Core's module calls it with the finished product, which it returns. It is called, not read, so that hooks
    run on the module: a distributed optimizer gathers weights there.
    """

    def forward(self, input_: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input_, Affine):
            return after_norm(Affine(self.weight, self.bias), input_)
        return (input_, None) if self.sequence_parallel else super().forward(input_, *args, **kwargs)


def after_norm(linear: Affine, norm: Affine) -> Affine:
    """Return the affine map of a norm and then a linear layer."""
    shift = None if norm.shift is None else linear.scale @ norm.shift
    if linear.shift is not None:
        shift = linear.shift if shift is None else shift + linear.shift
    return Affine(linear.scale * norm.scale, shift)


class Norms:
    """Applies the norms of one pass of a layer; what they return is freed until the backward pass if ``recomputed``."""

    def __init__(self, recomputed: bool) -> None:
        self.recomputed = recomputed and torch.is_grad_enabled()
        self._freed: list[CheckpointWithoutOutput | None] = []

    def __call__(self, norm: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        """Return ``norm`` of a state [S, B, D]."""
        wanted = self.recomputed and not isinstance(norm, IdentityOp)
        again = CheckpointWithoutOutput(fp8=None) if wanted else None  # its default needs Transformer Engine
        self._freed.append(again)
        return norm(state) if again is None else again.checkpoint(norm, state)

    def free(self, *outputs: Tensor) -> None:
        """Free what each norm returned, in the order of calls, until the gradient of the branch's output is there."""
        for again, output in zip(self._freed, outputs, strict=False):
            if again is not None:
                again.discard_output_and_register_recompute(output)


def project_together(
    state: Tensor, norms: tuple[LayerNorm | RMSNorm, ...], linears: tuple[SharedProjection, ...], apply: Norms
) -> tuple[Tensor, ...]:
    """Compute linear(norm(state)) of every pair: full sequences [S, B, this rank's columns] from [S / TP, B, D]."""
    affines = [linear(Affine(*norm(None))) for norm, linear in zip(norms, linears, strict=True)]
    shifts = [affine.shift for affine in affines]
    if any(shift is not None for shift in shifts):  # with --add-qkv-bias one has a shift, the other none
        shifts = [
            affine.scale.new_zeros(len(affine.scale)) if affine.shift is None else affine.shift for affine in affines
        ]
    projected = linear_with_grad_accumulation_and_async_allreduce(
        apply(norms[0].normalize, state),
        torch.cat([affine.scale for affine in affines]),
        torch.cat(shifts) if shifts[0] is not None else None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=True,
        tp_group=linears[0].tp_group,
    )
    return projected.split([len(affine.scale) for affine in affines], dim=-1)
