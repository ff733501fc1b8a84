"""Balance of experts without an auxiliary loss: a bias per expert on the scores by which a router chooses.

After each update the bias of every expert with fewer tokens than the mean rises by ``--moe-router-bias-update-rate``,
that of every one with more falls by it (Wang et al. 2024, arXiv:2408.15664, Algorithm 1). The tokens are those of the
global batch in all loops: a shared core has one bias per layer and expert.

Megatron-Core's routers hold the biases, count tokens and choose with them. It would update them before it is known
whether the step counts, so ``build_model`` turns its update off: a step that is skipped or computed again must not.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from mesh_megatron.parallel.build_model import RankModel


def forget_routed_tokens(model: RankModel) -> None:
    """Count the tokens of experts from 0; call it before a step is computed, and computed again."""
    for router in _biased_routers(model):
        router.local_tokens_per_expert.zero_()


@torch.no_grad()
def update_expert_biases(model: RankModel) -> None:
    """Move the biases by the tokens since ``forget_routed_tokens``; a collective of a pipeline stage's ranks."""
    routers = _biased_routers(model)
    if not routers:
        return
    tokens_RE = torch.stack([router.local_tokens_per_expert for router in routers]).double()  # sums stay exact
    dist.all_reduce(tokens_RE, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    missing_RE = tokens_RE.mean(-1, keepdim=True) - tokens_RE
    for router, missing_E in zip(routers, missing_RE, strict=True):
        router.expert_bias += router.config.moe_router_bias_update_rate * missing_E.sign().float()


def _biased_routers(model: RankModel) -> list[TopKRouter]:
    if not model.model.moe_router_enable_expert_bias:
        return []
    return [each for module in model.modules for each in module.modules() if isinstance(each, TopKRouter)]
