"""Bytes that autograd keeps for norms of queries and keys, against those of the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_layer_options import TOKENS
from test_mesh_model import VOCABULARY, build

from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.planning.activations import activation_sizes

pytestmark = pytest.mark.usefixtures("one_rank")
KEYS = {"share_kv_across_loops": True}


def kept_and_planned(fields: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes that a forward pass keeps without parameters, and those that the plan has for its layers."""
    model = build(recurrence="base", layout="1+2R2+1", **fields)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(TOKENS, None, TOKENS)
    run = RunConfig(model=model.model, training=TrainingConfig(micro_batch_size=len(TOKENS)))
    sizes = activation_sizes(run, VOCABULARY)
    layers = sum(sizes.kept(dense, core, chunk) for chunk, (dense, core) in enumerate([(1, 0), (0, 2), (0, 2), (1, 0)]))
    return sum(storage.nbytes() for place, storage in kept.items() if place not in parameters), layers


@pytest.mark.parametrize("shared", [{}, KEYS], ids=["own-keys", "shared-keys"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_norms_of_heads_keep_what_the_plan_says(normalization: str, groups: int, shared: dict[str, Any]) -> None:
    fields = {"normalization": normalization, "num_query_groups": groups, **shared}
    plain, normed = (kept_and_planned({**fields, "qk_layernorm": heads}) for heads in (False, True))
    assert normed[0] - plain[0] == pytest.approx(normed[1] - plain[1], rel=0.02)
