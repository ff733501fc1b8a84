"""Losses that keep a router's gates from saturating: ``--router-z-loss`` and ``--router-entropy-loss``.

With z the logits of one half (write or read) over the M slots and p its weights, per token:

    =======  =======================  ==========================================================
    gate     z-loss                   entropy loss
    =======  =======================  ==========================================================
    softmax  (log sum_b exp z_b)^2    log M - H(p), with H(p) = -sum_b p_b log p_b
    sigmoid  mean_b z_b^2             mean_b (log 2 - H(p_b, 1 - p_b))
    =======  =======================  ==========================================================

Each is the mean over tokens and both halves, and every cycle adds its own. The product W x is computed a second time
for it; without these losses nothing is added to the operation at the boundary.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mesh_megatron.model.memory import Gate, router_gradients
from mesh_megatron.model.memory_op import RouterWeights, router_input


class Coefficients(NamedTuple):
    """``--router-z-loss`` and ``--router-entropy-loss``."""

    z: float
    entropy: float


class RouterLosses:
    """The weight of these losses and their sums, shared by every router of this process."""

    weight: ClassVar[float] = 1.0
    """Factor of a mean in the summed loss of a micro-batch, from ``training/metrics/moe_metrics.py``."""
    sums: ClassVar[list[Tensor]] = []
    """(z-loss, entropy loss) of every cycle and micro-batch since ``take``, without coefficients."""

    @classmethod
    def take(cls) -> tuple[float, float, int]:
        """Return the sums of both losses and how many cycles they are of, and begin again."""
        count = len(cls.sums)
        z, entropy = torch.stack(cls.sums).sum(0).tolist() if count else (0.0, 0.0)
        cls.sums = []
        return z, entropy, count


def with_losses(
    routing: Tensor, state: Tensor, router: RouterWeights, coefficients: Coefficients, share: float
) -> Tensor:
    """Return ``routing`` [S, B, 2M], through which the backward pass also adds the losses' gradients.

    ``state`` [S, B, D] is what ``router`` computed it from; ``share`` is this rank's part of the mean over tokens.
    """
    if not any(coefficients) or not torch.is_grad_enabled():
        return routing
    seen = router_input(state, router.input)
    loss, parts = _Losses.apply(seen, router.weight, router.bias, router.gate, coefficients)
    RouterLosses.sums.append(parts)
    return _Attach.apply(routing, loss * share)


class _Attach(torch.autograd.Function):
    """Identity on the routing; its backward starts that of the loss, with the weight of this step."""

    @staticmethod
    def forward(ctx: Any, routing: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.detach()
        return routing.view_as(routing)

    @staticmethod
    def backward(ctx: Any, grad_routing: Tensor) -> tuple[Tensor, Tensor]:
        return grad_routing, torch.full_like(ctx.loss, RouterLosses.weight)


class _Losses(torch.autograd.Function):
    """The weighted sum of both losses, and both of them [2]; keeps the gradient of the logits, 2M numbers a token."""

    @staticmethod
    def forward(
        ctx: Any, seen: Tensor, weight: Tensor, bias: Tensor, gate: Gate, coefficients: Coefficients
    ) -> tuple[Tensor, Tensor]:
        logits = F.linear(seen.to(weight.dtype), weight, bias).unflatten(-1, (2, -1))
        losses, gradients = (_of_sigmoid if gate == "sigmoid" else _of_softmax)(logits)
        means = torch.stack([loss.mean() for loss in losses])
        halves = losses[0].numel()
        grad_logits = (coefficients.z * gradients[0] + coefficients.entropy * gradients[1]).flatten(-2) / halves
        ctx.save_for_backward(seen, weight, grad_logits)
        ctx.mark_non_differentiable(means)
        return coefficients.z * means[0] + coefficients.entropy * means[1], means

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        seen, weight, grad_logits = ctx.saved_tensors
        grad_logits = grad_logits * grad_loss
        return (grad_logits @ weight).to(seen.dtype), *router_gradients(grad_logits, seen), None, None


def _of_softmax(logits: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return both losses [..., 2] of ``logits`` [..., 2, M], and the gradients of their sums over all halves."""
    total = logits.logsumexp(-1, keepdim=True)
    log_weights = logits - total
    weights = log_weights.exp()
    entropy = -(weights * log_weights).sum(-1, keepdim=True)
    losses = total.square().squeeze(-1), (math.log(logits.shape[-1]) - entropy).squeeze(-1)
    return losses, (2 * total * weights, weights * (log_weights + entropy))


def _of_sigmoid(logits: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """As ``_of_softmax``, with the entropy of each weight and its complement."""
    weights = logits.sigmoid()
    entropy = F.softplus(logits) - logits * weights
    losses = logits.square().mean(-1), (math.log(2) - entropy).mean(-1)
    slots = logits.shape[-1]
    return losses, (2 * logits / slots, logits * weights * (1 - weights) / slots)
