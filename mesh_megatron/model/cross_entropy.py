"""Cross-entropy over a vocabulary split over ranks, computed in chunks of tokens: never are all logits in memory.

Shapes: T tokens, C of them in a chunk, D channels, V rows of the vocabulary on this rank. Logits are
``state_TD @ weight_VD.T``; a token's loss is log(sum over the whole vocabulary of exp(logit)) - (its label's logit).

The gradient of a weighted sum of losses follows from the logits, except for one factor that the backward pass supplies.
So the forward pass turns each chunk's logits into gradients in place. That takes three matrix products, as without
chunks, and no recomputation; only gradients of the size of the state and of the weight are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mesh_megatron.model.kernels import cross_entropy_torch
from mesh_megatron.model.kernels.availability import fused_kernels_run, require_fused_kernels

LossKernel = Literal["fused", "torch"]


def resolve_loss_kernel(name: str, device: torch.device) -> LossKernel:
    """Resolve ``--loss-kernel`` on ``device``: auto is fused on a GPU with Triton, else torch.

    Raises ``ValueError`` if fused is requested and cannot run.
    """
    if name == "auto":
        return "fused" if fused_kernels_run(device) else "torch"
    if name == "fused":
        require_fused_kernels("--loss-kernel", device)
        return "fused"
    return "torch"


def summed_cross_entropy(
    state_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    weights_T: Tensor,
    *,
    group: dist.ProcessGroup,
    chunk_tokens: int,
    kernel: LossKernel,
) -> tuple[Tensor, Tensor]:
    """Sum ``weights_T`` times the tokens' losses: a float32 scalar that is the same on every rank of ``group``.

    The second result is the tokens' losses [T] without their weights, constants. ``labels_T`` index the complete
    vocabulary, of which rank r of ``group`` holds rows r V to (r + 1) V. The gradient of the state is this rank's
    partial sum; the caller sums it over ranks. The gradient of ``weights_T``, the losses, is complete on every rank.
    """
    method = _Method(group, chunk_tokens, kernel, torch.is_grad_enabled())
    return _SummedCrossEntropy.apply(state_TD, weight_VD, labels_T, weights_T, method)


@dataclass(frozen=True)
class _Method:
    """Settings of the loss computation."""

    group: dist.ProcessGroup
    chunk_tokens: int
    kernel: LossKernel
    with_gradients: bool


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        state_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        method: _Method,
    ) -> tuple[Tensor, Tensor]:
        arithmetic, group, step = _arithmetic(method.kernel), method.group, method.chunk_tokens
        gradients = _Gradients(state_TD, weight_VD) if method.with_gradients else None
        rows_T = labels_T - group.rank() * weight_VD.shape[0]  # outside 0..V-1 where another rank holds the label

        def losses(tokens: slice) -> Tensor:
            logits_CV = state_TD[tokens] @ weight_VD.T
            normalizer, target = arithmetic.statistics(logits_CV, rows_T[tokens])
            normalizer, target = _over_ranks(normalizer, target, group)
            if gradients is not None:
                gradients.add(tokens, arithmetic.gradient(logits_CV, rows_T[tokens], normalizer, weights_T[tokens]))
            return normalizer - target

        chunks = (slice(first, first + step) for first in range(0, len(state_TD), step))
        losses_T = torch.cat([losses(tokens) for tokens in chunks])
        ctx.gradients, ctx.losses = gradients, losses_T if ctx.needs_input_grad[3] else None
        ctx.mark_non_differentiable(losses_T)
        return (losses_T * weights_T).sum(), losses_T

    @staticmethod
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of this loss were already used: only one backward pass is possible")
        of_weights = None if ctx.losses is None else ctx.losses * factor
        return (*gradients.times(factor), None, of_weights, None)


class _Gradients:
    """Gradients of state and weight, computed chunk by chunk; the weight's accumulates in float32."""

    def __init__(self, state_TD: Tensor, weight_VD: Tensor) -> None:
        self.state_TD, self.weight_VD = state_TD, weight_VD
        self.of_state = torch.empty_like(state_TD)
        self.of_weight: Tensor | None = None

    def add(self, tokens: slice, of_logits_CV: Tensor) -> None:
        torch.mm(of_logits_CV, self.weight_VD, out=self.of_state[tokens])
        state_CD = self.state_TD[tokens]
        if self.of_weight is None:
            single = len(of_logits_CV) == len(self.state_TD)
            self.of_weight = of_logits_CV.T @ state_CD
            self.of_weight = self.of_weight if single else self.of_weight.float()
        elif self.of_weight.dtype == of_logits_CV.dtype:
            self.of_weight.addmm_(of_logits_CV.T, state_CD)
        else:
            self.of_weight += of_logits_CV.T @ state_CD

    def times(self, factor: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.of_weight is not None:
            self.of_weight = self.of_weight.mul_(factor).to(self.weight_VD.dtype)
        return self.of_state.mul_(factor), self.of_weight


def _over_ranks(normalizer: Tensor, target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Combine the ranks' log-sum-exp over their rows, and the label's logit (0 on ranks without its row)."""
    if group.size() == 1:
        return normalizer, target
    highest = normalizer.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    summands = torch.stack([(normalizer - highest).exp(), target])
    dist.all_reduce(summands, group=group)
    return highest + summands[0].log(), summands[1]


def _arithmetic(kernel: LossKernel) -> Any:
    if kernel == "torch":
        return cross_entropy_torch
    from mesh_megatron.model.kernels import cross_entropy_triton  # needs Triton

    return cross_entropy_triton
