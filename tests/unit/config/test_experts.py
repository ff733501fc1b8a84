"""Settings of experts: every refusal names the flag, its value and a fix that works."""

from __future__ import annotations

import pytest

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.parallel import ParallelConfig

EXPERTS = {"num_experts": 4, "disable_bias_linear": True}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("refused", "message", "fix"),
    [
        ({"num_experts": 1}, "--num-experts 1", {"num_experts": 2}),
        ({"layout": "24", "recurrence": "vanilla"}, "--layout 24", {"layout": "4+8R2+4"}),
        ({"moe_router_topk": 5}, "--moe-router-topk 5", {"moe_router_topk": 4}),
        ({"moe_router_topk": 0}, "--moe-router-topk 0", {"moe_router_topk": 1}),
        ({"moe_ffn_hidden_size": 0}, "--moe-ffn-hidden-size 0", {"moe_ffn_hidden_size": 1}),
        ({"moe_aux_loss_coeff": -0.1}, "--moe-aux-loss-coeff -0.1", {"moe_aux_loss_coeff": 0.0}),
        (
            {"moe_router_enable_expert_bias": True},
            "--moe-router-enable-expert-bias with --moe-router-score-function softmax",
            {"moe_router_score_function": "sigmoid"},
        ),
    ],
)
def test_models(refused: dict, message: str, fix: dict) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(EXPERTS | refused)).validate()
    ModelConfig(**(EXPERTS | refused | fix)).validate()


@pytest.mark.parametrize(
    ("model", "refused", "message", "fix"),
    [
        ({}, {"expert_model_parallel_size": 3}, "use 1, 2 or 4", {"expert_model_parallel_size": 2}),
        ({}, {"expert_model_parallel_size": 0}, "--expert-model-parallel-size 0", {"expert_model_parallel_size": 1}),
        (
            {},
            {"expert_tensor_parallel_size": -1},
            "--expert-tensor-parallel-size -1",
            {"expert_tensor_parallel_size": 1},
        ),
        (
            {},
            {"recompute_granularity": "selective", "recompute_modules": ("shared_experts",)},
            "shared_experts needs --moe-shared-expert-intermediate-size",
            {"recompute_modules": ("moe",)},
        ),
        (
            {"moe_shared_expert_intermediate_size": 64},
            {"recompute_granularity": "selective", "recompute_modules": ("moe", "shared_experts")},
            "drop shared_experts",
            {"recompute_modules": ("shared_experts",)},
        ),
        ({"num_experts": None}, {"expert_model_parallel_size": 2}, "num-experts", {"expert_model_parallel_size": 1}),
        ({"moe_ffn_hidden_size": 33}, TP2, "--moe-ffn-hidden-size 33", {"expert_tensor_parallel_size": 1}),
        ({}, TP2 | {"sequence_parallel": False}, "add it", {"sequence_parallel": True}),
        ({"disable_bias_linear": False}, TP2, "biases of experts", {"expert_tensor_parallel_size": 1}),
        (
            {"layout": "4+2R2+4"},
            {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 4},
            "lower --pipeline-model-parallel-size to 2",
            {"pipeline_model_parallel_size": 2},
        ),
    ],
)
def test_layouts_of_ranks(model: dict, refused: dict, message: str, fix: dict) -> None:
    config = ModelConfig(**(EXPERTS | model))
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**refused).validate(config)
    ParallelConfig(**(refused | fix)).validate(config)


def test_number_of_ranks() -> None:
    parallel = ParallelConfig(expert_model_parallel_size=4, pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match="start a multiple of 8 ranks"):
        parallel.validate_expert_ranks(12)
    parallel.validate_expert_ranks(16)
