"""The loss of a vocabulary split over ranks, a chunk of tokens at a time: all logits never exist at once.

Shapes: T tokens, C of them in a chunk, D channels, V rows of the vocabulary on this rank. Logits are
``state_TD @ weight_VD.T``; a token's loss is log(sum over the whole vocabulary of exp(logit)) - (its label's logit).

The gradient of a sum of losses with known weights is known as soon as the logits are, but for one factor that comes
with the backward pass. So a chunk's logits turn into its gradients on the spot: three matrix products, as without
chunks, nothing computed twice, and what is kept are gradients of the size of the state and of the weight.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mesh_megatron.model.kernels import cross_entropy_torch
from mesh_megatron.model.kernels.availability import fused_kernels_run, require_fused_kernels

LossKernel = Literal["fused", "torch"]


def resolve_loss_kernel(name: str, device: torch.device) -> LossKernel:
    """What ``--loss-kernel`` means on ``device``: auto is fused on a GPU with Triton and torch elsewhere.

    Asking for fused where it cannot run raises ``ValueError``.
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
) -> Tensor:
    """Sum over tokens of ``weights_T`` times their loss, a float32 scalar that is the same on every rank of ``group``.

    ``labels_T`` count over the whole vocabulary, of which rank r of ``group`` holds rows r V to (r + 1) V. The state's
    gradient is this rank's summand; whoever made the state adds up the ranks'. Weights get no gradient.
    """
    return _SummedCrossEntropy.apply(
        state_TD, weight_VD, labels_T, weights_T, group, chunk_tokens, kernel, torch.is_grad_enabled()
    )


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        state_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        group: dist.ProcessGroup,
        chunk_tokens: int,
        kernel: LossKernel,
        with_gradients: bool,
    ) -> Tensor:
        arithmetic = _arithmetic(kernel)
        gradients = _Gradients(state_TD, weight_VD) if with_gradients else None
        rows_T = labels_T - group.rank() * weight_VD.shape[0]  # outside 0..V-1 where another rank holds the label

        def losses(tokens: slice) -> Tensor:
            logits_CV = state_TD[tokens] @ weight_VD.T
            normalizer, target = arithmetic.statistics(logits_CV, rows_T[tokens])
            normalizer, target = _over_ranks(normalizer, target, group)
            if gradients is not None:
                gradients.add(tokens, arithmetic.gradient(logits_CV, rows_T[tokens], normalizer, weights_T[tokens]))
            return (normalizer - target) * weights_T[tokens]

        ctx.gradients = gradients
        chunks = (slice(first, first + chunk_tokens) for first in range(0, len(state_TD), chunk_tokens))
        return torch.cat([losses(tokens) for tokens in chunks]).sum()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("this loss has gradients for one backward pass")
        return (*gradients.times(factor), None, None, None, None, None, None)


class _Gradients:
    """Of the state and the weight, gathered chunk by chunk; the weight's adds up in float32."""

    def __init__(self, state_TD: Tensor, weight_VD: Tensor) -> None:
        self.state_TD, self.weight_VD = state_TD, weight_VD
        self.of_state = torch.empty_like(state_TD)
        self.of_weight: Tensor | None = None

    def add(self, tokens: slice, of_logits_CV: Tensor) -> None:
        torch.mm(of_logits_CV, self.weight_VD, out=self.of_state[tokens])
        state_CD = self.state_TD[tokens]
        if self.of_weight is None:
            whole = len(of_logits_CV) == len(self.state_TD)
            self.of_weight = of_logits_CV.T @ state_CD
            self.of_weight = self.of_weight if whole else self.of_weight.float()
        elif self.of_weight.dtype == of_logits_CV.dtype:
            self.of_weight.addmm_(of_logits_CV.T, state_CD)
        else:
            self.of_weight += of_logits_CV.T @ state_CD

    def times(self, factor: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.of_weight is not None:
            self.of_weight = self.of_weight.mul_(factor).to(self.weight_VD.dtype)
        return self.of_state.mul_(factor), self.of_weight


def _over_ranks(normalizer: Tensor, target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """From each rank's log-sum-exp over its rows, and the label's logit where it holds it (else 0), the whole's."""
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
