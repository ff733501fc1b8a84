"""The products that a step runs, counted by torch, against the operations of the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_layer_options import TOKENS
from test_mesh_model import VOCABULARY, build
from torch.utils.flop_counter import FlopCounterMode

from mesh_megatron.planning.flops import training_flops_per_token

pytestmark = pytest.mark.usefixtures("one_rank")
KEYS = {"share_kv_across_loops": True}
MODELS: list[dict[str, Any]] = [
    {},
    KEYS,
    {**KEYS, "layout": "1+2R2+1", "num_query_groups": 2, "swiglu": True, "disable_bias_linear": True},
    {**KEYS, "num_query_groups": 1, "qk_layernorm": True, "parallel_residual": False},
    {**KEYS, "loop_lora_rank": 3, "kv_channels": 16},
    {**KEYS, "layout": "1+2R1+1"},
    {**KEYS, "loop_loss_weights": (1.0, 1.0, 1.0)},
    {"layout": "0+2R2+0", "num_query_groups": 2},
    {"layout": "1+2+2+1", "recurrence": "vanilla", "kv_channels": 4},
    {"layout": "3", "recurrence": "vanilla", "untie_embeddings_and_output_weights": False},
]


def products(fields: dict[str, Any]) -> int:
    """Operations of all matrix products of a step, forward and backward, without those inside of attention."""
    model = build(**{"recurrence": "base", **fields})
    with FlopCounterMode(display=False) as counter:
        model(TOKENS, None, TOKENS, torch.ones_like(TOKENS, dtype=torch.float32)).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    return sum(flops for call, flops in counted.items() if "attention" not in str(call))


@pytest.mark.parametrize("fields", MODELS, ids=str)
def test_a_step_runs_the_products_of_the_plan(fields: dict[str, Any]) -> None:
    planned = training_flops_per_token(build(**{"recurrence": "base", **fields}).model, VOCABULARY)
    assert products(fields) == TOKENS.numel() * (planned.projections + planned.feed_forward + planned.logits)


def test_shared_keys_save_the_products_of_keys_and_values() -> None:
    """Count 2 layers in 2 of 3 loops: keys, values of 2 groups of 8 channels from 32, forward and twice backward."""
    saved = products({"num_query_groups": 2}) - products({**KEYS, "num_query_groups": 2})
    assert saved == TOKENS.numel() * 3 * 2 * (2 * 2) * 32 * (2 * 2 * 8)
