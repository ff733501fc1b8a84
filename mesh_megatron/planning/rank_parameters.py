"""Parameter counts of one rank in closed form; ``parameters.py`` counts the complete model."""

from __future__ import annotations

from dataclasses import dataclass

from mesh_megatron.config.layout import share
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.planning.low_rank import low_rank_parameters
from mesh_megatron.planning.parameters import norm_parameters, norms_of_layer, recurrence_parameters


@dataclass(frozen=True, kw_only=True)
class RankParameters:
    """Parameters of one rank, grouped by the ranks that share their optimizer state and by precision."""

    dense: int
    """In the run's precision, replicated on all data- and context-parallel ranks."""
    experts: int
    """In the run's precision, replicated on the ranks that hold the same experts."""
    float32: int
    """Routers and coefficients, always float32; on the first rank of the ring."""
    matrices: int
    """Those of ``dense`` in matrices of layers, of which Muon keeps one moment."""
    expert_matrices: int
    """Those of ``experts``."""

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.float32


def rank_parameters(model: ModelConfig, parallel: ParallelConfig, vocabulary_rows: int, stage: int) -> RankParameters:
    """Count the parameters of a rank of pipeline stage ``stage`` (0..P-1); all ranks of a stage hold equally many."""
    tensor, ring = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    first, last = stage == 0, stage == ring - 1
    outside, cores = layers_of_rank(model, parallel, stage)
    dense = outside * _dense_layer(model, tensor) + cores * _core_layer(model, tensor)
    table = vocabulary_rows // tensor * model.hidden_size
    dense += table * first + (table + norm_parameters(model)) * last
    if first and last and not model.untie_embeddings_and_output_weights:
        dense -= table  # a tied table on a ring lives at both ends
    return RankParameters(
        dense=dense,
        experts=cores * _experts_of_layer(model, parallel),
        float32=recurrence_parameters(model) * first,
        matrices=outside * _dense_matrices(model, tensor) + cores * _core_matrices(model, tensor),
        expert_matrices=cores * _expert_matrices(model, parallel),
    )


def layers_of_rank(model: ModelConfig, parallel: ParallelConfig, stage: int) -> tuple[int, int]:
    """Return a rank's layers with weights, of prelude and coda, and of the core; a shared core counts once."""
    layout = model.segments
    prelude, core, coda = (
        len(share(range(layers), stage, parallel.pipeline_model_parallel_size))
        for layers in (layout.prelude, layout.core, layout.coda)
    )
    return prelude + coda, core * (1 if layout.shared else layout.loops)


def trained_parameters(model: ModelConfig, held: RankParameters) -> RankParameters:
    """Return those of the parameters ``held`` by a rank that learn: all, or with ``--exit-gate-only`` the gate.

    On a ring, the gate is on the rank that holds the recurrence's parameters.
    """
    if not model.exit_gate_only:
        return held
    gate = model.hidden_size + 1 if held.float32 else 0
    return RankParameters(dense=0, experts=0, float32=gate, matrices=0, expert_matrices=0)


def layer_parameters_of_rank(model: ModelConfig, parallel: ParallelConfig, core: bool) -> int:
    """Count a rank's share of one layer, including its experts."""
    tensor = parallel.tensor_model_parallel_size
    return _core_layer(model, tensor) + _experts_of_layer(model, parallel) if core else _dense_layer(model, tensor)


def _attention_matrices(model: ModelConfig, tensor: int) -> int:
    queries, groups = model.num_attention_heads // tensor, model.query_groups // tensor
    return model.hidden_size * model.head_size * 2 * (queries + groups)


def _dense_matrices(model: ModelConfig, tensor: int) -> int:
    return _attention_matrices(model, tensor) + _feed_forward_matrices(model, model.ffn_size // tensor)


def _core_matrices(model: ModelConfig, tensor: int) -> int:
    if model.num_experts is None:
        return _dense_matrices(model, tensor)
    return _attention_matrices(model, tensor) + _shared_expert_matrices(model, tensor)


def _shared_expert_matrices(model: ModelConfig, tensor: int) -> int:
    """Count the expert that every token passes: it has no biases."""
    return _feed_forward_matrices(model, (model.moe_shared_expert_intermediate_size or 0) // tensor)


def _expert_matrices(model: ModelConfig, parallel: ParallelConfig) -> int:
    if model.num_experts is None:
        return 0
    here = model.num_experts // parallel.expert_model_parallel_size
    return here * _feed_forward_matrices(model, model.expert_ffn_size // parallel.expert_tensor_size)


def _feed_forward_matrices(model: ModelConfig, width: int) -> int:
    return model.hidden_size * width * (3 if model.swiglu else 2)


def _attention_and_norms(model: ModelConfig, tensor: int, core: bool) -> int:
    bias, hidden = (0 if model.disable_bias_linear else 1), model.hidden_size
    heads = model.num_attention_heads * model.head_size // tensor
    groups = model.query_groups * model.head_size // tensor
    return (
        (hidden + model.qkv_bias) * (heads + 2 * groups) + heads * hidden + bias * hidden + norms_of_layer(model, core)
    )


def _feed_forward(model: ModelConfig, width: int) -> int:
    """Count two matrices, split to ``width`` columns and rows on this rank; the second bias is replicated."""
    bias, hidden = (0 if model.disable_bias_linear else 1), model.hidden_size
    return (hidden + bias) * width * (2 if model.swiglu else 1) + width * hidden + bias * hidden


def _dense_layer(model: ModelConfig, tensor: int, core: bool = False) -> int:
    low_rank = low_rank_parameters(model, tensor) if core else 0
    return _attention_and_norms(model, tensor, core) + _feed_forward(model, model.ffn_size // tensor) + low_rank


def _core_layer(model: ModelConfig, tensor: int) -> int:
    """Count a core layer without its experts, but with the shared one; their router is replicated on every rank."""
    if model.num_experts is None:
        return _dense_layer(model, tensor, core=True)
    bias = 0 if model.disable_bias_linear else 1
    router = model.num_experts * (model.hidden_size + bias)
    return _attention_and_norms(model, tensor, core=True) + router + _shared_expert_matrices(model, tensor)


def _experts_of_layer(model: ModelConfig, parallel: ParallelConfig) -> int:
    if model.num_experts is None:
        return 0
    here = model.num_experts // parallel.expert_model_parallel_size
    return here * _feed_forward(model, model.expert_ffn_size // parallel.expert_tensor_size)
