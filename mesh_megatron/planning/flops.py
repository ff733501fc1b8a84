"""Floating-point operations of one training token, in closed form.

The formula is the *model FLOPs* of Megatron-LM (Narayanan et al. 2021, arXiv 2104.04473, Appendix; Korthikanti et al.
2022, arXiv 2205.05198): the matrix products of the layers that are *computed* (a shared core counts each time it
runs), attention and logits, two operations a multiply-add, and a backward pass of twice the forward. Recomputed
activations are not counted, nor norms, activations, softmax and plain additions. As in Megatron-LM's own counter,
and unlike PaLM's (Chowdhery et al. 2022, arXiv 2204.02311, Appendix B), only the causal half of the attention scores
is counted: it is what a causal kernel computes. Added here: the routers' products and the weighted sums that mix the
state.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh_megatron.config.model import ModelConfig

FORMULA = "Megatron-LM model FLOPs (arXiv 2104.04473), computed layers, causal half of attention, routers and mixing"
BACKWARD_AND_FORWARD = 3
"""A matrix product's backward pass is two products of the same size."""


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """Operations of one token in training, forward and backward, by part."""

    projections: int
    """Query, key, value and output projections of all computed layers."""
    attention: int
    """Scores and weighted values, causal half."""
    feed_forward: int
    """Of a mixture: the experts that a token visits, and their router."""
    logits: int
    routing: int
    """Routers (mesh) or coefficients (dynamic) from the state."""
    mixing: int
    """Weighted sums over the history that give the next state."""

    @property
    def total(self) -> int:
        return self.projections + self.attention + self.feed_forward + self.logits + self.state_passing

    @property
    def state_passing(self) -> int:
        return self.routing + self.mixing


def training_flops_per_token(model: ModelConfig, vocabulary_rows: int, seq_length: int | None = None) -> TrainingFlops:
    """``seq_length`` defaults to the model's; every part is exact under the formula above."""
    sequence = model.seq_length if seq_length is None else seq_length
    layers, hidden = model.segments.computed_layers, model.hidden_size
    heads_width = model.num_attention_heads * model.head_size
    groups_width = model.query_groups * model.head_size
    routing, mixing = _state_passing_macs(model)
    per_macs = 2 * BACKWARD_AND_FORWARD
    return TrainingFlops(
        projections=per_macs * layers * hidden * (2 * heads_width + 2 * groups_width),
        attention=per_macs * layers * heads_width * sequence,  # 2 products x sequence/2 visible keys
        feed_forward=per_macs * _feed_forward_macs(model),
        logits=per_macs * hidden * vocabulary_rows,
        routing=per_macs * routing,
        mixing=per_macs * mixing,
    )


def _feed_forward_macs(model: ModelConfig) -> int:
    """Forward multiply-adds of a token in the feed-forward parts of all computed layers."""
    layout, hidden = model.segments, model.hidden_size
    products = 3 if model.swiglu else 2
    dense, core_layers = products * hidden * model.ffn_size, layout.core * layout.loops
    if model.num_experts is None:
        core = dense
    else:
        core = hidden * (model.moe_router_topk * products * model.expert_ffn_size + model.num_experts)
    return (layout.prelude + layout.coda) * dense + core_layers * core


def _state_passing_macs(model: ModelConfig) -> tuple[int, int]:
    """Forward multiply-adds of a token in routing and in mixing (history form of mesh, Section 3.2)."""
    loops, hidden, slots = model.segments.loops, model.hidden_size, model.memory_slots
    if model.scheme == "mesh":
        cycles = loops + 1
        written = cycles * (cycles + 1) // 2  # cycle c reads y_0..y_c
        routing = cycles * 2 * slots * hidden
        return routing, (written + cycles) * hidden + written * slots  # + h_emb each cycle, and <read, write>
    if model.scheme in ("static", "dynamic"):
        return (3 * hidden * loops if model.scheme == "dynamic" else 0), 3 * hidden * loops
    return 0, 0
