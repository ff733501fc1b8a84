"""Losses after every loop: their weights, from numbers or an exit gate, and the objective that training minimises.

x_t is the state that would enter the coda after loop t of K, and CE_t a token's loss if it did. The gate reads every
x_t (Ouro, arXiv 2510.25741, Sections 3.2 to 3.4; there without a coda)::

    lambda_t = sigmoid(<w, x_t> + b)              the probability to leave after loop t, for a token still in the core
    p_t = lambda_t prod_{j < t} (1 - lambda_j)    the share of exits after loop t; p_K is what remains
    sum_t p_t CE_t - beta H(p)                    a token's objective (--exit-gate)

With ``--exit-gate-only`` nothing but the gate learns, from the improvement I_t = max(0, CE_{t-1} - CE_t)::

    1/K sum_{t=2..K} BCE(1 - lambda_t, sigmoid(k (I_t - gamma)))

``--loop-loss-weights`` are constant p_t, without gate and entropy. Shapes: K loops, B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mesh_megatron.config.model import ModelConfig

Measure = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Returns, for weights [K, B, S] of the losses after loops, their weighted sum and the losses [K, B, S], constants."""


def exit_log_shares(logits_KBS: Tensor) -> Tensor:
    """Compute log p_t [K, B, S] from the gate's logits; the last loop's only decide where there is nothing to decide.

    Sums of logarithms, so that no share becomes 0 and its logarithm infinite.
    """
    stay, leave = F.logsigmoid(-logits_KBS), F.logsigmoid(logits_KBS)
    still_there = torch.cat([torch.zeros_like(stay[:1]), stay[:-1].cumsum(0)])
    return still_there + torch.cat([leave[:-1], 0 * leave[-1:]])  # 0 times: of one loop, the gate gets a gradient of 0


def gate_losses(model: ModelConfig, logits_KBS: Tensor, losses_KBS: Tensor) -> Tensor:
    """Compute each token's loss [B, S] of the gate alone, against whether a loop has improved the token's loss."""
    improvement = (losses_KBS[:-1] - losses_KBS[1:]).clamp(min=0)
    go_on = torch.sigmoid(model.exit_improvement_slope * (improvement - model.exit_improvement_threshold))
    gates = F.binary_cross_entropy_with_logits(-logits_KBS[1:], go_on, reduction="none")
    return gates.sum(0) / len(logits_KBS)


def outcome(model: ModelConfig, logits_KBS: Tensor | None, weights_BS: Tensor, measure: Measure) -> Tensor:
    """Return the objective summed over tokens, then what the log shows of it: sums over tokens, which are constants.

    These are, in this order, the expected loss sum_t p_t CE_t, the entropy H(p), the loss of the gate alone, p_1..p_K
    and CE_1..CE_K. ``weights_BS`` are the tokens' weights; without ``logits_KBS``, p are ``--loop-loss-weights``.
    """
    if logits_KBS is None:
        total = sum(model.loop_loss_weights)
        shares = torch.stack([torch.full_like(weights_BS, weight / total) for weight in model.loop_loss_weights])
        entropy = torch.zeros_like(weights_BS)
    else:
        log_shares = exit_log_shares(logits_KBS)
        shares = log_shares.exp()
        entropy = -(shares * log_shares).sum(0)
    expected, losses = measure(shares * weights_BS)
    gate = torch.zeros_like(weights_BS)
    if logits_KBS is not None and model.exit_gate_only:
        gate = gate_losses(model, logits_KBS, losses)
        objective = (gate * weights_BS).sum()
    else:
        objective = expected - model.exit_entropy_coeff * (entropy * weights_BS).sum()
    by_token = torch.cat([torch.stack([(shares * losses).sum(0), entropy, gate]), shares, losses]).detach()
    return torch.cat([objective[None], (by_token * weights_BS).sum((1, 2))])


def further_sums(loops: int) -> int:
    """Return how many sums ``outcome`` adds to the objective and the expected loss."""
    return 2 + 2 * loops


def measures(model: ModelConfig, means: Sequence[float]) -> dict[str, float]:
    """Return by log key the means over tokens of what ``outcome`` adds to the objective, except the expected loss."""
    _, entropy, gate, *of_loops = means
    loops = len(of_loops) // 2
    shares, losses = of_loops[:loops], of_loops[loops:]
    found = {f"loop loss/loop {loop}": loss for loop, loss in enumerate(losses, start=1)}
    if not model.exit_gate:
        return found
    found |= {"exit loop": sum(loop * share for loop, share in enumerate(shares, start=1)), "exit entropy": entropy}
    found |= {f"exit share/loop {loop}": share for loop, share in enumerate(shares, start=1)}
    return found | ({"exit gate loss": gate} if model.exit_gate_only else {})
