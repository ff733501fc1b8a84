"""Translate this project's settings into Megatron-Core's ``TransformerConfig``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from mesh_megatron.config.fp8 import Fp8Config
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.config.ring import ring_chunks

# Megatron-Core 0.19 calls the modules that run as CUDA graphs by another name.
_NO_GRAPHS: dict[str, Any] = {
    "cuda_graph_modules" if hasattr(TransformerConfig, "cuda_graph_modules") else "cuda_graph_scope": []
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class MeshTransformerConfig(TransformerConfig):
    """``TransformerConfig`` with the settings for which Megatron-Core has no field."""

    backprop_loops: int | None = None
    """Loops that gradients pass through, the last ones (``--backprop-loops``); None for all."""
    fp8_core_only: bool = False
    """Prelude and coda stay in bfloat16."""
    fused_rotary: bool = False
    """Layers without Transformer Engine rotate queries and keys in a Triton kernel."""
    hashed_hidden_dropout: float = 0.0
    """Dropout of ``dropout.py`` after embedding and branches; Megatron-Core's own, which is random, stays 0."""
    hashed_attention_dropout: float = 0.0
    """Dropout of attention weights, in the same way."""
    dropout_seed: int = 0
    loops_with_parameters: int = 0
    """Loops that have parameters of their own in core layers (norms, low-rank differences); 0 if they share all."""
    loop_lora_rank: int = 0
    """Rank of the low-rank differences; 0 for none."""


def _leave(weight: torch.Tensor) -> None:
    """Leave ``weight`` to ``initialize.py``. (Megatron-Core still marks the weight as tensor-parallel.)"""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig | None = None,
    precision: str = "fp32",
    fp8: Fp8Config | None = None,
) -> MeshTransformerConfig:
    """Build the configuration of every module.

    ``num_layers`` is the computed depth; each segment gets a copy with its own depth. ``initialize.py`` initialises the
    weights instead of Megatron-Core, so that they do not depend on the layout of ranks.
    """
    parallel = parallel or ParallelConfig()
    ring = parallel.pipeline_model_parallel_size
    recompute: dict[str, Any] = {"recompute_modules": list(parallel.recompute_modules)}
    if parallel.recompute_granularity == "full":
        recompute |= {
            "recompute_method": parallel.recompute_method,
            "recompute_num_layers": parallel.recompute_num_layers,
        }
    return MeshTransformerConfig(
        num_layers=model.segments.computed_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_size,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_layernorm,
        gated_linear_unit=model.swiglu,
        activation_func=F.silu if model.swiglu else F.gelu,
        bias_activation_fusion=False,  # Megatron-Core's fused GELU is the tanh approximation
        add_bias_linear=not model.disable_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        loops_with_parameters=model.loops_with_parameters,
        loop_lora_rank=model.loop_lora_rank or 0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        hashed_hidden_dropout=model.hidden_dropout,
        hashed_attention_dropout=model.attention_dropout,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=_DTYPES[precision],
        pipeline_dtype=_DTYPES[precision],
        attention_softmax_in_fp32=True,
        calculate_per_token_loss=True,  # the loss must not depend on the size of micro-batches
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        pipeline_model_parallel_size=ring,
        virtual_pipeline_model_parallel_size=len(ring_chunks(model)) if ring > 1 else None,
        overlap_p2p_comm=ring > 1 and parallel.overlap_p2p,
        batch_p2p_comm=ring > 1 and not parallel.overlap_p2p,
        deallocate_pipeline_outputs=False,  # a send may still be reading them (Megatron-LM issue 4047)
        **_NO_GRAPHS,
        recompute_granularity=parallel.recompute_granularity,
        **recompute,
        **_fp8(fp8 or Fp8Config()),
        **_experts(model, parallel),
    )


def _fp8(fp8: Fp8Config) -> dict[str, Any]:
    if fp8.fp8_format is None:
        return {}
    return {
        "fp8": fp8.fp8_format,
        "fp8_recipe": fp8.fp8_recipe,
        "fp8_core_only": fp8.fp8_core_only,
        "fp8_margin": fp8.fp8_margin,
        "fp8_amax_history_len": fp8.fp8_amax_history_len,
        "fp8_amax_compute_algo": fp8.fp8_amax_compute_algo,
    }


def _experts(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Return the fields for the core's mixture of experts; its router computes in float32, like the mesh routers."""
    if model.num_experts is None:
        return {}
    return {
        "num_moe_experts": model.num_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_scores_first and model.moe_router_score_function == "softmax",
        "moe_router_score_function": model.moe_router_score_function,
        "moe_router_topk_scaling_factor": model.moe_router_topk_scaling_factor,
        "moe_router_num_groups": model.moe_router_num_groups,
        "moe_router_group_topk": model.moe_router_group_topk,
        "moe_router_enable_expert_bias": model.moe_router_enable_expert_bias,
        "moe_router_bias_update_rate": model.moe_router_bias_update_rate,
        "moe_router_dtype": "fp32",
        "moe_ffn_hidden_size": model.expert_ffn_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_router_load_balancing_type": model.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
    }
