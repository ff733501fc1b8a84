"""One product, and one gathering of the sequence, for both branches of a parallel residual.

With sequence parallelism each branch's first linear layer gathers its own normed input, forward and again backward. But
the two norms differ in scale and shift only: with x^ the normalised state, W (g x^ + h) + b = (W diag(g)) x^ + (W h +
b). So x^ is gathered once and multiplied with both scaled weights, one below the other; its gradient is scattered once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor

from mesh_megatron.model.norm import LayerNorm, RMSNorm


class Affine(NamedTuple):
    """What a norm does after normalising, or a linear layer to its input."""

    scale: Tensor
    shift: Tensor | None


class ProjectionWithBias(ColumnParallelLinear):
    """A column-parallel linear layer whose matrix product adds the bias, which costs nothing there.

    Megatron-Core adds it in a pass of its own over the widest tensors of a layer, or leaves that to the caller. It
    still does with tensor parallelism, whose communication its own product overlaps, and where it adds the weight's
    gradient to the buffer by itself.
    """

    def forward(self, input_: Any, *args: Any, **kwargs: Any) -> Any:
        """[S, B, columns of this rank], and the bias where the caller is to add it."""
        if self.bias is None or self.tp_group.size() > 1 or self.gradient_accumulation_fusion:
            return super().forward(input_, *args, **kwargs)
        return F.linear(input_, self.weight, self.bias), None


class SharedProjection(ProjectionWithBias):
    """A column-parallel linear layer whose product, with sequence parallelism, is made together with its neighbour's.

    Then it is called twice: with its norm's affine, for the affine of both; and by Megatron-Core's module with what
    came of that, which it hands on. (Called, not read, so that hooks on the module run: a distributed optimizer
    gathers weights there.)
    """

    def forward(self, input_: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input_, Affine):
            bias = None if input_.shift is None else self.weight @ input_.shift
            if self.bias is not None:
                bias = self.bias if bias is None else bias + self.bias
            return Affine(self.weight * input_.scale, bias)
        return (input_, None) if self.sequence_parallel else super().forward(input_, *args, **kwargs)


def project_together(
    state: Tensor, norms: tuple[LayerNorm | RMSNorm, ...], linears: tuple[SharedProjection, ...]
) -> tuple[Tensor, ...]:
    """linear(norm(state)) of every pair, whole sequences [S, B, this rank's columns] from a part [S / TP, B, D]."""
    affines = [linear(Affine(*norm(None))) for norm, linear in zip(norms, linears, strict=True)]
    shifts = [affine.shift for affine in affines if affine.shift is not None]
    projected = linear_with_grad_accumulation_and_async_allreduce(
        norms[0].normalize(state),
        torch.cat([affine.scale for affine in affines]),
        torch.cat(shifts) if shifts else None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=True,
        tp_group=linears[0].tp_group,
    )
    return projected.split([len(affine.scale) for affine in affines], dim=-1)
