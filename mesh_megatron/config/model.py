"""Model settings: backbone (Section 4, Appendix B) and recurrence (Sections 3.1, 3.2, Appendix E)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from mesh_megatron.config.bounds import Bounds, Count, check_bounds, flag
from mesh_megatron.config.exits import ExitsConfig, check_exits
from mesh_megatron.config.layout import Layout

Recurrence = Literal[
    "vanilla",
    "base",
    "residual",
    "anchor",
    "anchor_emb",
    "residual+anchor",
    "anchor+anchor_emb",
    "residual+anchor+anchor_emb",
    "static",
    "dynamic",
    "mesh",
    "vanilla+mesh",
    "adapter",
    "decay",
    "hyper",
    "hyper-dynamic",
    "attend",
]
RouterInput = Literal["state", "normalized", "rmsnorm"]
RouterGate = Literal["softmax", "sigmoid"]

LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Constants of --use-rope-scaling besides its factor, as in Megatron-LM."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ExitsConfig):
    """Model: the GPT-NeoX backbone as Pythia uses it, and how its recursion passes state."""

    layout: str = "2+4R2+2"
    """Layers as the paper writes them: P+CRK+Q (a core of C layers run K times), P+C+C+Q (loops that share
    no weights) or N (a plain model)."""
    num_layers: Count | None = None
    """Layers of a plain model, where neither flags nor files give --layout; with one, its layers are checked against
    this number: those with their own weights, or those that are computed."""
    recurrence: Recurrence = "mesh"
    """Scheme that passes state between loops. vanilla is base with unshared loops, vanilla+mesh is mesh with
    unshared loops."""
    num_memory_slots: Count | None = None
    """Memory slots M of mesh; default K + 3 (Table 3)."""
    router_init: Literal["uniform", "base", "residual", "anchor", "anchor_emb", "sum"] = "uniform"
    """Initial router biases: uniform sets them to zero (as we read the paper); with the others states start near those
    of the base recursion, of a sum of the embedding and all outputs, or of the scheme of that name."""
    router_bias: Annotated[float, Bounds()] = 3.0
    """Initial bias of the slots that --router-init favours; the other slots get 0, with sigmoid gates minus this."""
    router_init_std: Annotated[float, Bounds(least=0, zero="start with the biases alone")] | None = None
    """Standard deviation of the initial weights of the routers of mesh and dynamic; default --init-method-std."""
    router_input: RouterInput = "state"
    """Input of the routers: the state that enters the block (as we read the paper), a LayerNorm of it (normalized) or
    an RMSNorm of it (rmsnorm); neither norm has parameters."""
    router_gate: RouterGate = "softmax"
    """From a router's logits to weights of slots: softmax makes the M weights of a write and of a read add up to one
    (the paper); sigmoid computes each by itself, so that a state may be a sum."""
    router_temperature: Annotated[float, Bounds(above=0)] = 1.0
    """Divide the routers' logits by this."""
    router_scale: Annotated[float, Bounds()] | None = None
    """Multiply the part of the logits that depends on the state by a learned factor, one a router, that starts at this
    (0.01, for example); default no such factor."""
    router_z_loss: Annotated[float, Bounds(least=0, zero="no such loss")] = 0.0
    """Coefficient of the z-loss of mesh's routers, of each cycle: the mean square of log(sum(exp(logits))), with
    sigmoid gates of the logits."""
    router_entropy_loss: Annotated[float, Bounds(least=0, zero="no such loss")] = 0.0
    """Coefficient of the entropy loss of mesh's routers, of each cycle: how far the entropy of their weights is below
    that of even weights, in nats."""
    decay_input: Literal["diagonal", "linear"] = "diagonal"
    """Matrix B of decay, h' = A * f_core(h) + B h0: a number per channel, or a matrix [D, D]."""
    hyper_lanes: Count = 2
    """Lanes of state n of hyper and hyper-dynamic."""
    loop_norm: bool = False
    """Apply an RMSNorm with one learned scale to the state that enters each loop, in any scheme."""
    loop_embedding: bool = False
    """Add a learned vector of each loop to the state that enters it, in any scheme; vectors start at zero."""
    per_loop_norms: bool = False
    """Give the norms of core layers (but those of queries and keys) a scale, and a shift if they have one, for each
    loop of the shared core."""
    loop_lora_rank: Count | None = None
    """Give every linear layer of the core a low-rank difference of this rank for each loop, W + B_t A_t (LoRA); A
    starts random, B at zero. Default none."""
    share_kv_across_loops: bool = False
    """Compute keys and values of core layers in the first loop alone; later loops compute queries only, and attend to
    these. The key-value cache has one entry per core layer."""
    sandwich_norm: bool = False
    """Also normalise what attention and the feed-forward layer return, before it is added to the state, in every
    layer."""

    memory_kernel: Literal["auto", "fused", "torch", "slots"] = "auto"
    """Implementation of mesh's memory: fused is one Triton kernel per boundary between loops (needs a GPU), torch the
    same without Triton, slots the paper's buffer of M states (slow, for comparison); auto is fused where it can run,
    else torch."""
    loss_kernel: Literal["auto", "fused", "torch"] = "auto"
    """Implementation of the cross-entropy loss: fused is Triton kernels that never store the logits in float32 (needs
    a GPU; it replaces Megatron-LM's --cross-entropy-loss-fusion); auto is fused where it can run, else torch."""
    loss_chunk_tokens: Count = 4096
    """Number of tokens whose logits are in memory at a time."""

    hidden_size: Count = 768
    """Width D of the model."""
    num_attention_heads: Count = 12
    """Attention heads."""
    ffn_hidden_size: Count | None = None
    """Width of the feed-forward layer; default 4 D, also with --swiglu."""
    group_query_attention: bool = False
    """Grouped-query attention, with one key and value head unless --num-query-groups is given; that flag alone does."""
    num_query_groups: Count | None = None
    """Key and value heads (grouped-query attention); default one per attention head."""
    kv_channels: Count | None = None
    """Width of one attention head; default D / heads."""
    seq_length: Count = 2048
    """Tokens in a training sequence."""
    max_position_embeddings: Count | None = None
    """Longest sequence an exported model declares; default --seq-length."""

    parallel_residual: bool = True
    """Compute x + attn(ln1(x)) + mlp(ln2(x)) as GPT-NeoX does; otherwise the feed-forward layer follows attention."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Normalisation of layers and output."""
    qk_layernorm: bool = False
    """Normalise each head's queries and keys before their rotation, by --normalization with its own weights."""
    norm_epsilon: Annotated[float, Bounds(above=0)] = 1e-5
    """Epsilon of the normalisation."""
    swiglu: bool = False
    """Use a SiLU-gated feed-forward layer instead of exact GELU."""
    disable_bias_linear: bool = False
    """Leave biases out of linear layers."""
    add_qkv_bias: bool = False
    """With --disable-bias-linear, keep the biases of queries, keys and values."""
    rotary_percent: Annotated[float, Bounds(above=0, most=1)] = 0.25
    """Share of each head's channels that rotary positions rotate; 1.0 for all."""
    rotary_base: Count = 10000
    """Base of the rotary frequencies."""
    use_rope_scaling: bool = False
    """Slow down the low rotary frequencies as Llama 3.1 does for texts of more than 8192 tokens."""
    rope_scaling_factor: Annotated[float, Bounds(least=1)] = 8.0
    """With --use-rope-scaling, factor of the lowest frequencies."""
    rotary_seq_len_interpolation_factor: Annotated[float, Bounds(least=1)] | None = None
    """Divide all rotary angles by this (linear interpolation of positions)."""
    hidden_dropout: Annotated[float, Bounds(least=0, below=1)] = 0.0
    """Share of values that training drops after the embedding, attention and feed-forward layer; Megatron-LM's default
    is 0.1. The masks do not depend on the layout of ranks."""
    attention_dropout: Annotated[float, Bounds(least=0, below=1)] = 0.0
    """Share of attention weights that training drops, in our own attention (--attention-backend local or auto);
    Megatron-LM's default is 0.1."""
    embedding_scaling: bool = True
    """Multiply the embedding's output by sqrt(D) (Appendix B)."""
    untie_embeddings_and_output_weights: bool = True
    """Separate input embedding and output matrix."""

    num_experts: int | None = None
    """Number of experts in each core layer (a looped mixture of experts); prelude and coda stay dense."""
    moe_router_topk: Count = 2
    """Number of experts that each token is routed to."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """Function that turns an expert's logit into its score."""
    moe_router_pre_softmax: bool = False
    """Apply the softmax before the experts are chosen, over all, and not after it, over the chosen ones."""
    moe_router_topk_scaling_factor: Annotated[float, Bounds(above=0)] | None = None
    """Factor of the chosen experts' weights."""
    moe_router_num_groups: Count | None = None
    """Choose experts only from the best --moe-router-group-topk of so many groups of experts."""
    moe_router_group_topk: Count | None = None
    """Groups from which experts are chosen."""
    moe_ffn_hidden_size: Count | None = None
    """Width of one expert; default --ffn-hidden-size."""
    moe_shared_expert_intermediate_size: Count | None = None
    """Width of a feed-forward layer that every token passes beside its experts; default none."""
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "none"] = "aux_loss"
    """Auxiliary loss that balances tokens over experts: per micro-batch, per sequence, or none. Each loop adds its
    own."""
    moe_aux_loss_coeff: Annotated[float, Bounds(least=0, zero="no such loss")] = 0.01
    """Coefficient of the auxiliary loss of one layer in one loop."""
    moe_z_loss_coeff: Annotated[float, Bounds(least=0, zero="no such loss")] = 0.0
    """Coefficient of the z-loss of one layer in one loop: the mean square of log(sum(exp(router's logits)))."""

    moe_router_enable_expert_bias: bool = False
    """Choose experts by their scores plus a bias per expert, which rises while an expert gets fewer tokens than the
    mean and falls otherwise: balance without an auxiliary loss. Needs --moe-router-score-function sigmoid."""
    moe_router_bias_update_rate: Annotated[float, Bounds(above=0)] = 1e-3
    """Change of these biases in each step."""

    init_method_std: Annotated[float, Bounds(least=0)] = 0.02
    """Standard deviation of initial weights; for output projections it is divided by sqrt(2 N_compute) (Appendix B)."""
    embedding_init_method_std: Annotated[float, Bounds(least=0)] | None = None
    """Standard deviation of the embedding's initial weights; default --init-method-std."""
    padded_vocab_size: Count | None = None
    """Number of embedding rows; default the tokenizer's vocabulary, padded."""
    make_vocab_size_divisible_by: Count = 128
    """Pad the tokenizer's vocabulary to a multiple of this, independently of the layout of ranks."""

    @property
    def segments(self) -> Layout:
        """The parsed layout; unshared for vanilla and vanilla+mesh."""
        layout = Layout.parse(self.layout)
        return layout.unshared() if self.recurrence.startswith("vanilla") else layout

    @property
    def scheme(self) -> str:
        """The recurrence scheme, without regard to weight sharing: a key of ``SCHEMES`` in ``recurrence.py``."""
        return {"vanilla": "base", "vanilla+mesh": "mesh"}.get(self.recurrence, self.recurrence)

    @property
    def memory_slots(self) -> int:
        """Number of memory slots M, with its default of K + 3 (Table 3)."""
        return self.segments.loops + 3 if self.num_memory_slots is None else self.num_memory_slots

    @property
    def losses_per_token(self) -> int:
        """Number of losses of a token in training: one, or with losses after every loop K."""
        return self.segments.loops if self.losses_after_loops else 1

    def at_loops(self, loops: int) -> ModelConfig:
        """Return the model whose shared core runs ``loops`` times, with as many memory slots as this one."""
        layout = replace(self.segments, loops=loops)
        return replace(self, layout=str(layout), num_layers=None, num_memory_slots=self.memory_slots)

    @property
    def head_size(self) -> int:
        """Channels per attention head, with the default."""
        return self.hidden_size // self.num_attention_heads if self.kv_channels is None else self.kv_channels

    @property
    def query_groups(self) -> int:
        """Number of key and value heads, with the default."""
        if self.num_query_groups is not None:
            return self.num_query_groups
        return 1 if self.group_query_attention else self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layer, with the default."""
        return 4 * self.hidden_size if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def expert_ffn_size(self) -> int:
        """Width of one expert, with the default."""
        return self.ffn_size if self.moe_ffn_hidden_size is None else self.moe_ffn_hidden_size

    @property
    def moe_router_scores_first(self) -> bool:
        """True if experts get their scores before they are chosen; a softmax over one chosen expert has no gradient."""
        return self.moe_router_pre_softmax or self.moe_router_topk == 1 or self.moe_router_score_function == "sigmoid"

    @property
    def loops_with_parameters(self) -> int:
        """Number of loops that have parameters of their own in core layers, 0 if they share all."""
        return self.segments.loops if self.per_loop_norms or self.loop_lora_rank is not None else 0

    @property
    def shares_keys(self) -> bool:
        """True if later loops attend to the keys and values of the first."""
        return self.share_kv_across_loops and self.segments.loops > 1

    @property
    def cached_layers(self) -> int:
        """Number of entries of a key-value cache: computed layers, but one per core layer if loops share keys."""
        return self.segments.unique_layers if self.shares_keys else self.segments.computed_layers

    @property
    def needs_local_layers(self) -> str | None:
        """The flag that layers of Transformer Engine do not have, or None."""
        if self.per_loop_norms:
            return "--per-loop-norms"
        if self.loop_lora_rank is not None:
            return f"--loop-lora-rank {self.loop_lora_rank}"
        return "--share-kv-across-loops" if self.share_kv_across_loops else None

    @property
    def qkv_bias(self) -> bool:
        """True if queries, keys and values have biases."""
        return self.add_qkv_bias or not self.disable_bias_linear

    @property
    def drops(self) -> bool:
        """True if training drops any values."""
        return self.hidden_dropout > 0 or self.attention_dropout > 0

    @property
    def joint_branches(self) -> bool:
        """True if both branches of a parallel residual are summed before one collective.

        Dropout and norms of their outputs need each alone.
        """
        return self.parallel_residual and self.hidden_dropout == 0 and not self.sandwich_norm

    @property
    def rotary_scaling(self) -> dict[str, Any] | None:
        """The scaling of rotary frequencies as transformers' ``rope_parameters`` names it, or None."""
        if self.use_rope_scaling:
            return {"rope_type": "llama3", "factor": self.rope_scaling_factor, **LLAMA3_SCALING}
        if self.rotary_seq_len_interpolation_factor is not None:
            return {"rope_type": "linear", "factor": self.rotary_seq_len_interpolation_factor}
        return None

    @property
    def rotary_size(self) -> int:
        """Number of channels per head that rotary positions rotate."""
        return int(self.head_size * self.rotary_percent)

    def validate(self) -> None:
        """Raise ``ValueError`` naming the flag, its value and the fix."""
        check_bounds(self)
        layout = self.segments
        if self.scheme not in ("base",) and layout.loops == 0:
            raise ValueError(
                f"--recurrence {self.recurrence} with --layout {self.layout}: a plain model has no loop to pass "
                "state between; use --recurrence vanilla or a layout such as 4+8R2+4"
            )
        for name in ("loop_norm", "loop_embedding"):
            if layout.loops == 0 and getattr(self, name):
                raise ValueError(
                    f"{flag(name)} with --layout {self.layout}: a plain model has no loop for a state to enter; drop "
                    "the flag or use a layout such as 4+8R2+4"
                )
        self._validate_weights_of_loops()
        check_exits(self, layout.loops, layout.shared, self.layout)
        if self.num_layers not in (None, layout.unique_layers, layout.computed_layers):
            raise ValueError(
                f"--num-layers {self.num_layers} with --layout {self.layout}, which has {layout.unique_layers} layers "
                f"and computes {layout.computed_layers}: drop --num-layers or change one of the two"
            )
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            near = self.hidden_size // self.num_attention_heads * self.num_attention_heads
            raise ValueError(
                f"--hidden-size {self.hidden_size} does not divide into --num-attention-heads "
                f"{self.num_attention_heads}: use {near or self.num_attention_heads} or set --kv-channels"
            )
        if self.num_attention_heads % self.query_groups:
            raise ValueError(
                f"--num-query-groups {self.num_query_groups} does not divide --num-attention-heads "
                f"{self.num_attention_heads}"
            )
        if self.rotary_size < 2 or self.rotary_size % 2:
            raise ValueError(
                f"--rotary-percent {self.rotary_percent} rotates {self.rotary_size} of {self.head_size} channels "
                "per head: this must be an even number of at least 2"
            )
        if self.use_rope_scaling and self.rotary_seq_len_interpolation_factor is not None:
            raise ValueError(
                "--use-rope-scaling and --rotary-seq-len-interpolation-factor: an export cannot have both; give one"
            )
        if self.num_experts is not None:
            self._validate_experts(self.num_experts)
        elif (shared := self.moe_shared_expert_intermediate_size) is not None:
            raise ValueError(
                f"--moe-shared-expert-intermediate-size {shared} needs --num-experts: set it or drop the flag"
            )
        elif self.moe_router_enable_expert_bias:
            raise ValueError("--moe-router-enable-expert-bias needs --num-experts: set it or drop the flag")

    def _validate_weights_of_loops(self) -> None:
        layout, rank = self.segments, f"--loop-lora-rank {self.loop_lora_rank}"
        of_shared_core = {
            "--per-loop-norms": self.per_loop_norms,
            rank: self.loop_lora_rank,
            "--share-kv-across-loops": self.share_kv_across_loops,
        }
        for given, value in of_shared_core.items():
            if value and (layout.loops == 0 or not layout.shared):
                raise ValueError(
                    f"{given} with --layout {self.layout} and --recurrence {self.recurrence}: only loops of a "
                    "shared core share weights; drop the flag or use a layout such as 4+8R2+4"
                )
        if self.loop_lora_rank is None:
            return
        if self.loop_lora_rank > self.hidden_size:
            raise ValueError(
                f"{rank}: must be at most --hidden-size {self.hidden_size}, from where on it is no low rank; lower it"
            )
        if self.num_experts is not None:
            raise ValueError(
                f"{rank} does not work with --num-experts {self.num_experts}: experts "
                "have no differences of loops; drop one of the two"
            )

    def _validate_experts(self, experts: int) -> None:
        if experts < 2:
            raise ValueError(f"--num-experts {experts}: must be at least 2; drop the flag for a dense core")
        if self.segments.loops == 0:
            raise ValueError(
                f"--num-experts {experts} with --layout {self.layout}: experts replace the core's "
                "feed-forward layers and a plain model has no core; use a layout such as 4+8R2+4"
            )
        if self.moe_router_topk > experts:
            raise ValueError(f"--moe-router-topk {self.moe_router_topk}: must be 1 to --num-experts {experts}")
        if self.moe_shared_expert_intermediate_size is not None and not self.disable_bias_linear:
            raise ValueError("--moe-shared-expert-intermediate-size needs --disable-bias-linear: add it")
        if self.moe_router_enable_expert_bias and self.moe_router_score_function != "sigmoid":
            raise ValueError(
                f"--moe-router-enable-expert-bias with --moe-router-score-function {self.moe_router_score_function}: "
                "biases are added to scores of sigmoid; use --moe-router-score-function sigmoid"
            )
        self._validate_groups(experts)

    def _validate_groups(self, experts: int) -> None:
        groups, best, chosen = self.moe_router_num_groups, self.moe_router_group_topk, self.moe_router_topk
        if (groups is None) != (best is None):
            raise ValueError("--moe-router-num-groups and --moe-router-group-topk belong together: give both")
        if groups is None or best is None:
            return
        if experts % groups or best > groups:
            raise ValueError(
                f"--moe-router-num-groups {groups}: must divide --num-experts {experts} and be at least "
                f"--moe-router-group-topk {best}"
            )
        if chosen % best or chosen > best * (experts // groups):
            raise ValueError(
                f"--moe-router-topk {chosen}: must be a multiple of --moe-router-group-topk {best} and at most "
                f"{experts // groups * best}, the experts of so many groups"
            )

    def padded_vocabulary(self, tokenizer_vocab: int | None) -> int:
        """Return the number of embedding rows for a tokenizer of ``tokenizer_vocab`` entries (None: not known).

        Raise ``ValueError`` if ``--padded-vocab-size`` is too small, or if neither it nor a tokenizer is given.
        """
        if self.padded_vocab_size is not None:
            if tokenizer_vocab is not None and tokenizer_vocab > self.padded_vocab_size:
                raise ValueError(
                    f"--padded-vocab-size {self.padded_vocab_size} is smaller than the tokenizer's vocabulary of "
                    f"{tokenizer_vocab}: use at least {tokenizer_vocab}"
                )
            return self.padded_vocab_size
        if tokenizer_vocab is None:
            raise ValueError("the vocabulary is unknown: give --padded-vocab-size or --tokenizer-type and its model")
        multiple = self.make_vocab_size_divisible_by
        return -(-tokenizer_vocab // multiple) * multiple
