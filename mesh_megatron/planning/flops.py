"""Floating-point operations per training token, in closed form.

The formula is the *model FLOPs* of Megatron-LM (Narayanan et al. 2021, arXiv 2104.04473, Appendix; Korthikanti et al.
2022, arXiv 2205.05198): the matrix products of the layers that are *computed* (a shared core counts each time it
runs), attention and logits, two operations per multiply-add, and a backward pass of twice the forward. Recomputed
layers are not counted, nor norms, activations, softmax and plain additions. As in Megatron-LM's own counter,
and unlike PaLM's (Chowdhery et al. 2022, arXiv 2204.02311, Appendix B), only the causal half of the attention scores
is counted, which is what a causal kernel computes. Our addition: the routers' products and the weighted sums that mix
the state.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from mesh_megatron.config.loops import Shares, loops_without_gradients
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.recurrence import scheme_spec
from mesh_megatron.planning.low_rank import low_rank_macs

FORMULA = "Megatron-LM model FLOPs (arXiv 2104.04473), computed layers, causal half of attention, routers and mixing"
BACKWARD_AND_FORWARD = 3
"""Factor for a forward and a backward pass: the backward pass of a product is two products of the same size."""


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """Operations per token in training, forward and backward, by part."""

    projections: int
    """Query, key, value and output projections of all computed layers."""
    attention: int
    """Scores and weighted values, causal half."""
    feed_forward: int
    """Feed-forward layers; with experts, those that a token is routed to, and the router."""
    logits: int
    routing: int
    """Routers (mesh), coefficients (dynamic) and exit gate from the state."""
    mixing: int
    """Weighted sums over earlier states that give the next state."""

    @property
    def total(self) -> int:
        return self.projections + self.attention + self.feed_forward + self.logits + self.state_passing

    @property
    def state_passing(self) -> int:
        return self.routing + self.mixing


@dataclass(frozen=True, kw_only=True)
class LayerMacs:
    """Forward multiply-adds per token in one layer."""

    projections: int
    attention: int
    feed_forward: int
    shared_expert: int
    """Those of ``feed_forward`` in the expert that every token passes."""


def layer_macs(
    model: ModelConfig, core: bool = False, seq_length: int | None = None, own_keys: bool = True
) -> LayerMacs:
    """Return the multiply-adds of a layer of prelude or coda, or of the ``core``: of experts those of one token.

    Without ``own_keys`` it computes no keys and values, as in later loops of ``--share-kv-across-loops``.
    """
    sequence, hidden = model.seq_length if seq_length is None else seq_length, model.hidden_size
    heads_width = model.num_attention_heads * model.head_size
    groups_width = model.query_groups * model.head_size if own_keys else 0
    matrices = 3 if model.swiglu else 2
    feed_forward, shared = matrices * hidden * model.ffn_size, 0
    if core and model.num_experts is not None:
        shared = matrices * hidden * (model.moe_shared_expert_intermediate_size or 0)
        routed = matrices * hidden * model.moe_router_topk * model.expert_ffn_size
        feed_forward = shared + routed + hidden * model.num_experts
    of_attention, of_feed_forward = low_rank_macs(model, own_keys) if core else (0, 0)
    return LayerMacs(
        projections=hidden * (2 * heads_width + 2 * groups_width) + of_attention,
        attention=heads_width * sequence,  # 2 products x sequence/2 visible keys
        feed_forward=feed_forward + of_feed_forward,
        shared_expert=shared,
    )


def training_flops_per_token(
    model: ModelConfig, vocabulary_rows: int, seq_length: int | None = None, backprop_loops: int | None = None
) -> TrainingFlops:
    """Return the operations per token, exact under the formula above; ``seq_length`` defaults to the model's.

    Layers of loops without gradients (``--backprop-loops``) count forward only; their state passing counts in full.
    Later loops that share keys and values compute none. With losses after every loop, coda and logits count K times; if
    the gate alone learns, all else forward only.
    """
    layout = model.segments
    exits, scheme = model.losses_per_token, scheme_spec(model)
    exit_routing, exit_mixing = scheme.exit_macs() if model.losses_after_loops else (0, 0)
    only_forward = layout.core * loops_without_gradients(layout.loops, backprop_loops)
    saved = only_forward * (BACKWARD_AND_FORWARD - 1) / BACKWARD_AND_FORWARD
    outside, inside = layout.prelude + exits * layout.coda, layout.core * layout.loops - saved
    dense, core = (layer_macs(model, of_core, seq_length) for of_core in (False, True))
    sharing = layout.core * (layout.loops - 1) if model.shares_keys else 0  # all have gradients
    of_keys = core.projections - layer_macs(model, True, seq_length, own_keys=False).projections
    per_macs = 2 * (1 if model.exit_gate_only else BACKWARD_AND_FORWARD)
    of_gate = 2 * (2 if model.exit_gate_only else BACKWARD_AND_FORWARD)  # alone, it gives its input no gradient
    gate = exits * model.hidden_size if model.exit_gate else 0
    return TrainingFlops(
        projections=round(per_macs * (outside * dense.projections + inside * core.projections - sharing * of_keys)),
        attention=round(per_macs * (outside + inside) * dense.attention),
        feed_forward=round(per_macs * (outside * dense.feed_forward + inside * core.feed_forward)),
        logits=per_macs * exits * model.hidden_size * vocabulary_rows,
        routing=per_macs * (scheme.routing_macs() + exit_routing) + of_gate * gate,
        mixing=per_macs * (scheme.mixing_macs() + exit_mixing),
    )


def mean_flops_per_token(
    model: ModelConfig, vocabulary_rows: int, shares: Shares, backprop_loops: int | None = None
) -> TrainingFlops:
    """Return the operations per token, averaged over steps with other numbers of loops, rounded to integers."""
    own = model.segments.loops
    runs = [(model if loops == own else model.at_loops(loops), share) for loops, share in shares.items()]
    counts = [
        (training_flops_per_token(run, vocabulary_rows, backprop_loops=backprop_loops), share) for run, share in runs
    ]

    def mean(part: str) -> int:
        return round(sum(getattr(flops, part) * share for flops, share in counts))

    return TrainingFlops(**{part.name: mean(part.name) for part in fields(TrainingFlops)})
