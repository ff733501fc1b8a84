"""Settings of experts and of sharded parameters: every refusal names the flag, its value and a mend that works."""

from __future__ import annotations

import pytest

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.parallel import ParallelConfig

EXPERTS = {"num_experts": 4, "disable_bias_linear": True}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("refused", "message", "mend"),
    [
        ({"num_experts": 1}, "--num-experts 1", {"num_experts": 2}),
        ({"layout": "24", "recurrence": "vanilla"}, "--layout 24", {"layout": "4+8R2+4"}),
        ({"moe_router_topk": 5}, "--moe-router-topk 5", {"moe_router_topk": 4}),
        ({"moe_router_topk": 0}, "--moe-router-topk 0", {"moe_router_topk": 1}),
        ({"moe_ffn_hidden_size": 0}, "--moe-ffn-hidden-size 0", {"moe_ffn_hidden_size": 1}),
        ({"moe_aux_loss_coeff": -0.1}, "--moe-aux-loss-coeff -0.1", {"moe_aux_loss_coeff": 0.0}),
    ],
)
def test_models(refused: dict, message: str, mend: dict) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(EXPERTS | refused)).validate()
    ModelConfig(**(EXPERTS | refused | mend)).validate()


@pytest.mark.parametrize(
    ("model", "refused", "message", "mend"),
    [
        ({}, {"expert_model_parallel_size": 3}, "use 1, 2 or 4", {"expert_model_parallel_size": 2}),
        ({}, {"expert_model_parallel_size": 0}, "--expert-model-parallel-size 0", {"expert_model_parallel_size": 1}),
        (
            {},
            {"expert_tensor_parallel_size": -1},
            "--expert-tensor-parallel-size -1",
            {"expert_tensor_parallel_size": 1},
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
def test_layouts_of_ranks(model: dict, refused: dict, message: str, mend: dict) -> None:
    config = ModelConfig(**(EXPERTS | model))
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**refused).validate(config)
    ParallelConfig(**(refused | mend)).validate(config)


def test_number_of_ranks() -> None:
    parallel = ParallelConfig(expert_model_parallel_size=4, pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match="start a multiple of 8 ranks"):
        parallel.validate_expert_ranks(12)
    parallel.validate_expert_ranks(16)
