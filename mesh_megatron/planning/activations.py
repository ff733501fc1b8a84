"""Sizes of the activations that one micro-batch's forward pass keeps for its backward pass, in bytes on one rank.

The sizes cover the tensors that autograd and the model keep with local layers (torch and Megatron-Core). Tests compare
them with ``torch.autograd.graph.saved_tensors_hooks`` to within 5%. Attention keeps no score matrix. Layers of
Transformer Engine have not been measured. On a GPU, torch may use a fused RMSNorm that keeps less.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.config.recurrence import FLOAT32, StateSize, scheme_spec
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.scheme import SchemeSpec

INT64 = 8
GATE_NUMBERS = 14
"""Numbers per token and loop between the exit gate's logits and the objective."""


def gradient_bytes(run: RunConfig) -> int:
    """Return the bytes of one value of a gradient, except those of float32 weights."""
    return 2 if run.parallel.grad_reduce_in_bf16 else FLOAT32


def value_bytes(run: RunConfig) -> int:
    """Return the bytes per value of weights and states, in the run's precision."""
    return FLOAT32 if run.training.precision == "fp32" else 2


@dataclass(frozen=True, kw_only=True)
class ActivationSizes:
    """Bytes per micro-batch; widths, tokens and sequence are this rank's share."""

    state: int
    """One [S, B, D] tensor, as it is sent along the ring."""
    layer: int
    """Kept by a layer of prelude or coda, including its input; with full recomputation only while its group is
    recomputed."""
    core_layer: int
    """The same for a layer of the core."""
    later_core_layer: int
    """The same in loops after the first, which may share its keys and values."""
    keys: int
    """Keys and values of a core layer that later loops share: kept also where layers are recomputed."""
    group: int | None
    """Number of layers per recomputed group, of which only the input is kept; None without such groups."""
    alone: int
    """Number of layers of a chunk that are recomputed one by one; the others keep everything."""
    part: int
    """Kept only while the parts of a layer that selective recomputation names are recomputed."""
    gate: int
    """The states after all loops as the exit gate keeps them; 0 where it keeps them as others do."""
    head: int
    """Output norm and loss, including the gradients that the loss computes in its forward pass, and exits' numbers."""
    tokens: int
    """Token ids of the input."""
    mask: int
    """Mask of documents, where attention is computed again with it."""
    history: tuple[int, ...]
    """Kept by state passing at the start of chunk 0..K+1 besides the layers' inputs: source states and routing."""
    deferred: int
    """Gradient that one memory boundary of mesh holds for the boundaries before it."""
    logits: int
    """Logits of one chunk of tokens, while the loss is computed."""

    def of_core(self, chunk: int) -> int:
        """Return what a core layer keeps in chunk ``chunk`` of the ring, which is a loop's number."""
        return self.later_core_layer if chunk > 1 else self.core_layer

    def kept(self, dense: int, core: int, chunk: int) -> int:
        """Return the bytes kept by one chunk of so many dense and core layers; no group spans two chunks."""
        keys = self.keys if chunk == 1 else 0
        if self.group is not None:
            return -(-(dense + core) // self.group) * self.state + core * keys
        inputs, again = min(self.alone, dense + core), min(self.alone, core)
        dense, core = max(dense - self.alone, 0), core - again
        return inputs * self.state + dense * self.layer + core * self.of_core(chunk) + again * keys

    def recomputed(self, dense: int, core: int, chunk: int) -> int:
        """Return the bytes held temporarily while the largest group of one chunk is recomputed, or parts of a layer."""
        group = min(self.alone, 1) if self.group is None else self.group
        return max(min(group, dense) * self.layer, min(group, core) * self.of_core(chunk), self.part)


def activation_sizes(run: RunConfig, vocabulary_rows: int) -> ActivationSizes:
    """Compute the sizes from the run's model, precision, micro-batch, layout of ranks and recompute choice."""
    model, parallel = run.model, run.parallel
    counting, scheme = _Counting(run), scheme_spec(model)
    tokens, rows = counting.tokens, vocabulary_rows // parallel.tensor_model_parallel_size
    exits = model.losses_per_token
    chunk = min(exits * tokens, model.loss_chunk_tokens)
    full = parallel.recompute_granularity == "full"
    block = parallel.recompute_method == "block"
    of_weight = rows * model.hidden_size * (counting.size if chunk == exits * tokens else FLOAT32)
    of_state = counting.state + counting.norm_statistics + 2 * tokens * model.hidden_size * counting.size
    return ActivationSizes(
        state=counting.state,
        layer=counting.layer(core=False),
        core_layer=counting.layer(core=True),
        later_core_layer=counting.layer(core=True, later=True),
        keys=counting.keys if model.shares_keys else 0,
        group=parallel.recompute_num_layers if full and not block else None,
        alone=parallel.recompute_num_layers if full and block else 0,
        part=counting.recomputed_part(),
        gate=counting.gate_states(),
        head=counting.gate_numbers() + (0 if model.exit_gate_only else exits * of_state + of_weight),
        tokens=tokens * INT64,
        mask=counting.mask() if full or counting.attends_again else 0,
        history=tuple(counting.history(scheme, chunk) for chunk in range(model.segments.loops + 2)),
        deferred=0 if model.exit_gate_only else scheme.deferred(counting.state_size),
        logits=chunk * rows * counting.size,
    )


class _Counting:
    """Byte counts of one rank's share of a micro-batch."""

    def __init__(self, run: RunConfig) -> None:
        self.model: ModelConfig = run.model
        self.parallel: ParallelConfig = run.parallel
        self.size = value_bytes(run)
        self.tensor = run.parallel.tensor_model_parallel_size
        self.positions = run.model.seq_length // run.parallel.context_parallel_size
        self.tokens = self.positions * run.training.micro_batch_size
        self.state_tokens = self.tokens // self.tensor if run.parallel.sequence_parallel else self.tokens
        on_ring = run.parallel.pipeline_model_parallel_size > 1
        self.documents = run.data.reset_attention_mask
        self.state_size = StateSize(self.state_tokens, run.model.hidden_size, self.size, on_ring)
        self.state = self.state_size.state

    @property
    def attends_again(self) -> bool:
        """True if the backward pass computes attention again in layers that are not recomputed completely."""
        return self.parallel.recomputes("core_attn") or self.model.attention_dropout > 0

    def mask(self, value_bytes: int = 1) -> int:
        """Return the bytes of the mask [B, 1, S, S] that keeps documents apart, or 0 without one."""
        return self.tokens * self.model.seq_length * value_bytes if self.documents else 0

    @property
    def norm_statistics(self) -> int:
        """LayerNorm: mean and deviation. RMSNorm: its input in float32 where it is not, and the normalised state."""
        if self.model.normalization == "LayerNorm":
            return 2 * self.state_tokens * self.size
        whole = self.state_tokens * self.model.hidden_size * FLOAT32
        return whole + (whole if self.size < FLOAT32 else 0) + self.state_tokens * FLOAT32

    def history(self, scheme: SchemeSpec, chunk: int) -> int:
        """Return the bytes kept by state passing at the start of a chunk, besides the layers' inputs."""
        model, loops = self.model, self.model.segments.loops
        own = scheme.own_exits and self.state_size.on_ring and 2 <= chunk <= loops
        kept = self.state if model.losses_after_loops and own else 0
        if model.exit_gate_only:
            return kept
        if model.losses_after_loops:
            kept += scheme.exit_history(chunk, self.state_size)
        if model.loop_norm and 0 < chunk <= loops:  # a norm keeps the state beside the layers' input
            kept += self.state
        return kept + scheme.history(chunk, self.state_size)

    def gate_states(self) -> int:
        """Return the bytes of the states after all loops that the exit gate keeps: in float32, of layers' inputs."""
        copied = self.model.exit_gate and (self.size < FLOAT32 or self.model.exit_gate_only)
        return self.model.segments.loops * self.state_tokens * self.model.hidden_size * FLOAT32 if copied else 0

    def gate_numbers(self) -> int:
        """Return the bytes of numbers per token between the exit gate's logits and the objective."""
        return self.model.segments.loops * GATE_NUMBERS * self.tokens * FLOAT32 if self.model.exit_gate else 0

    @property
    def keys(self) -> int:
        """Bytes of a layer's keys and values."""
        return self.tokens * 2 * self.model.query_groups * self.model.head_size // self.tensor * self.size

    def layer(self, core: bool, later: bool = False) -> int:
        """Return what a layer of prelude or coda, or of the core, keeps; ``later`` in a loop after the first."""
        attention = self._attention(core and self.model.shares_keys, later)
        experts = core and self.model.num_experts is not None
        norms = 0 if self.parallel.recomputes("layernorm") else 2
        inputs = 1 if self.model.parallel_residual else 2  # one after the other: that of the second branch too
        outputs = 2 if self.model.sandwich_norm else 0  # the norms of outputs keep their inputs
        kept = (inputs + norms + outputs) * self.state + (norms + outputs) * self.norm_statistics + attention
        if experts:
            if self.parallel.recomputes("moe"):
                return kept
            return kept + self._experts() + (0 if self.parallel.recomputes("shared_experts") else self._shared_expert())
        low_rank = (self.model.loop_lora_rank or 0) if core else 0
        kept += self._low_rank(low_rank)
        if self._joint:  # one normalised state
            queries_alone = later and self.model.shares_keys
            kept += self._joint_weight(2 * low_rank, own_keys=not queries_alone)
            kept -= norms // 2 * (self.state + self.norm_statistics)
        return kept + self._dense_feed_forward(again=self.parallel.recomputes("mlp"))

    def recomputed_part(self) -> int:
        """Return the bytes of a feed-forward layer or of experts while they are computed again."""
        dense = self._dense_feed_forward() if self.parallel.recomputes("mlp") else 0
        if self.parallel.recomputes("moe"):
            return max(dense, self._experts() + self._shared_expert())
        return max(dense, self._shared_expert() if self.parallel.recomputes("shared_experts") else 0)

    @property
    def _joint(self) -> bool:
        """True if one product gives both branches' first projections."""
        return self.model.joint_branches and self.parallel.sequence_parallel

    def _dense_feed_forward(self, again: bool = False) -> int:
        """Return the bytes that a feed-forward layer keeps; if it is computed ``again``, its input, if it owns that."""
        plain, gated = (int(self._joint), 2 * int(self._joint)) if again else (2, 5)
        return self._feed_forward(self.tokens, self.model.ffn_size // self.tensor, plain, gated)

    def _attention(self, sharing: bool, later: bool) -> int:
        """Return what attention keeps; with ``sharing`` in a loop of the core, a ``later`` one or the first."""
        model, selective = self.model, self.attends_again
        ranks = self.parallel.context_parallel_size
        heads = model.num_attention_heads * model.head_size // self.tensor
        groups = model.query_groups * model.head_size // self.tensor
        own = 0 if sharing and later else groups
        rotations = 4 * self.positions * model.rotary_size * self.size
        sums = 0 if selective else self.tokens * model.num_attention_heads // self.tensor * FLOAT32
        if ranks > 1 and not selective:  # queries, gathered keys and values, outputs of two chunks, joined output
            widths = 3 * heads + 2 * groups * ranks + (2 * own if sharing else 0)
        elif sharing:  # rotated queries and keys, values apart from their projection, the output
            widths = 2 * heads + 2 * own
        else:  # rotated queries and keys, the projection they came from (with the values), the output
            widths = 3 * heads + 3 * groups
        mask = 0 if selective else self.mask(self.size)  # of hidden keys, or of what is added to scores
        kept = rotations + sums + mask + self.tokens * widths * self.size
        if model.qk_layernorm:
            kept += self._norms_of_heads(heads, own, copied=not (sharing and later))
        return kept + self._sharing(heads, own, later) if sharing else kept

    def _sharing(self, heads: int, groups: int, later: bool) -> int:
        """Return what else attention keeps: the projection if norms keep it, later the matrix's rows of queries.

        Where there is one key-value head these rows are together in the matrix, and no copy. In low precision RMSNorms
        keep copies of their input, LayerNorms never do.
        """
        model = self.model
        kept = heads * model.hidden_size * self.size if later and model.query_groups > self.tensor else 0
        if model.qk_layernorm and self._norms_keep_inputs:
            kept += self.tokens * (heads + 2 * groups) * self.size
        return kept

    @property
    def _norms_keep_inputs(self) -> bool:
        """True if norms of heads keep their inputs as they are, not copies in float32."""
        return self.model.normalization == "LayerNorm" or self.size == FLOAT32

    def _norms_of_heads(self, queries: int, keys: int, copied: bool) -> int:
        """Return what the norms of queries and keys keep, besides the tensor that their inputs are parts of.

        Queries of several key-value heads with several queries each are put together first: ``copied``.
        """
        values, heads = self.tokens * (queries + keys), self.tokens * (queries + keys) // self.model.head_size
        apart = self.tensor < self.model.query_groups < self.model.num_attention_heads
        kept = self.tokens * queries * self.size if copied and apart and self._norms_keep_inputs else 0
        if self.model.normalization == "LayerNorm":
            return kept + 2 * heads * self.size
        return kept + values * FLOAT32 + (values * FLOAT32 if self.size < FLOAT32 else 0) + heads * FLOAT32

    def _low_rank(self, rank: int) -> int:
        """Return the bytes of A x in the four linear layers of a core layer (``--loop-lora-rank``)."""
        branches = 1 if self.parallel.recomputes("mlp") else 2
        second = self.tokens if self._joint else self.state_tokens  # already summed over ranks
        return branches * (self.tokens + second) * rank * self.size

    def _joint_weight(self, more_rows: int, own_keys: bool) -> int:
        """Return the bytes of both branches' first matrices, scaled by their norms: sequence parallelism joins them.

        ``more_rows`` every rank holds in full.
        """
        model = self.model
        rows = (model.num_attention_heads + 2 * model.query_groups * own_keys) * model.head_size
        rows += model.ffn_size * (2 if model.swiglu else 1)
        return (rows // self.tensor + more_rows) * model.hidden_size * self.size

    def _feed_forward(self, tokens: int, width: int, plain: int, gated: int) -> int:
        return tokens * width * (gated if self.model.swiglu else plain) * self.size

    def _experts(self) -> int:
        """Return the bytes kept by experts, tokens spread evenly: token copies, products, weights and routing."""
        model, split = self.model, self.parallel.expert_tensor_size
        chosen, count = model.moe_router_topk, model.num_experts or 0
        copies = self.state_tokens * chosen * split
        kept = copies * (model.hidden_size * self.size + FLOAT32)
        kept += self._feed_forward(copies, model.expert_ffn_size // split, 3, 6)
        return kept + self.state_tokens * (28 * chosen + 9 * count)

    def _shared_expert(self) -> int:
        """Return the bytes kept by the expert that every token passes."""
        width = self.model.moe_shared_expert_intermediate_size or 0
        return self._feed_forward(self.tokens, width // self.tensor, 2, 5)
