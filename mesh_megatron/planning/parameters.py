"""Parameter counts of a model in closed form, as the trainer prints them.

D is the hidden size, K the number of core loops, M the number of memory slots. ``tests/unit/planning`` compares every
count with the real model's tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.recurrence import scheme_spec
from mesh_megatron.planning.low_rank import low_rank_parameters


@dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """Parameters of one transformer layer."""

    attention: int
    """Projection to queries, keys and values, and the output projection."""
    feed_forward: int
    """Both matrices (SwiGLU: gate, up and down); with experts, all of them and their router."""
    norms: int
    """The two norms, which parallel and sequential residuals both have; those of outputs, queries and keys, if any."""

    low_rank: int = 0
    """Low-rank differences of all loops in a core layer (``--loop-lora-rank``)."""

    @property
    def total(self) -> int:
        return self.attention + self.feed_forward + self.norms + self.low_rank


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Unique parameters of a model: a shared core counts once, however often it runs."""

    layer: LayerParameters
    """A layer of prelude or coda."""
    core_layer: LayerParameters
    """A layer of the core: the same, unless it is a mixture of experts."""
    embedding: int
    """Input embedding, and the output matrix unless the two are tied."""
    prelude: int
    core: int
    coda: int
    final_norm: int
    recurrence: int
    """Trained parameters of state passing: the routers of mesh, the coefficients of static and dynamic."""

    @property
    def non_embedding(self) -> int:
        return self.prelude + self.core + self.coda + self.final_norm + self.recurrence

    @property
    def total(self) -> int:
        return self.embedding + self.non_embedding


def count_parameters(model: ModelConfig, vocabulary_rows: int) -> ParameterCount:
    """Count the parameters of ``model`` with an embedding of ``vocabulary_rows`` (padded) rows."""
    layout = model.segments
    layer, core_layer = layer_parameters(model), layer_parameters(model, model.num_experts, core=True)
    tables = 2 if model.untie_embeddings_and_output_weights else 1
    return ParameterCount(
        layer=layer,
        core_layer=core_layer,
        embedding=tables * vocabulary_rows * model.hidden_size,
        prelude=layout.prelude * layer.total,
        core=layout.unique_core_layers * core_layer.total,
        coda=layout.coda * layer.total,
        final_norm=norm_parameters(model),
        recurrence=recurrence_parameters(model),
    )


def layer_parameters(model: ModelConfig, experts: int | None = None, core: bool = False) -> LayerParameters:
    """Count one layer of prelude and coda or of the ``core``, dense or with ``experts``.

    Linear layers have biases unless ``--disable-bias-linear``.
    """
    bias = 0 if model.disable_bias_linear else 1
    hidden = model.hidden_size
    heads_width = model.num_attention_heads * model.head_size
    qkv_width = heads_width + 2 * model.query_groups * model.head_size

    def feed_forward(width: int) -> int:
        fc1_width = 2 * width if model.swiglu else width
        return (hidden + bias) * fc1_width + (width + bias) * hidden

    return LayerParameters(
        attention=(hidden + model.qkv_bias) * qkv_width + (heads_width + bias) * hidden,
        feed_forward=feed_forward(model.ffn_size)
        if experts is None
        else experts * (feed_forward(model.expert_ffn_size) + hidden + bias)
        + (feed_forward(shared) if (shared := model.moe_shared_expert_intermediate_size) is not None else 0),
        norms=norms_of_layer(model, core),
        low_rank=low_rank_parameters(model) if core else 0,
    )


def norms_of_layer(model: ModelConfig, core: bool) -> int:
    """Count the norms of one layer; all heads share one norm of queries and one of keys, loops may not share theirs."""
    each, loops = (4 if model.sandwich_norm else 2), (model.segments.loops if core and model.per_loop_norms else 1)
    norms = each * loops * norm_parameters(model)
    return norms + 2 * norm_parameters(model) // model.hidden_size * model.head_size if model.qk_layernorm else norms


def norm_parameters(model: ModelConfig) -> int:
    """Count one norm: LayerNorm has scale and shift, RMSNorm only a scale."""
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)


def recurrence_parameters(model: ModelConfig) -> int:
    """Count the parameters of state passing: mesh has 2 (K+1) M (D+1), static 3, dynamic 3 (D+1) (Table 4)."""
    return sum(math.prod(parameter.shape) for parameter in scheme_spec(model).all_parameters().values())


def active_parameters(model: ModelConfig, vocabulary_rows: int) -> int:
    """Count the parameters that are active for one token: with experts, only those that it is routed to."""
    count = count_parameters(model, vocabulary_rows)
    if model.num_experts is None:
        return count.total
    bias = 0 if model.disable_bias_linear else 1
    router = model.num_experts * (model.hidden_size + bias)
    shared = model.hidden_size * (model.moe_shared_expert_intermediate_size or 0) * (3 if model.swiglu else 2)
    expert = (count.core_layer.feed_forward - router - shared) // model.num_experts
    unvisited = model.num_experts - model.moe_router_topk
    return count.total - model.segments.unique_core_layers * unvisited * expert
