"""Configuration of a recursive (looped) transformer with MeSH or additive state passing.

This file travels with exported weights: it needs transformers 5.4 or newer and nothing else.
"""

from typing import Any, Literal

import transformers
from packaging.version import Version
from transformers import PreTrainedConfig

if Version(transformers.__version__) < Version("5.4"):
    raise ImportError(f"this model needs transformers 5.4 or newer, and {transformers.__version__} is installed")

AUTO_MAP = {
    "AutoConfig": "configuration_mesh.MeshConfig",
    "AutoModel": "modeling_mesh.MeshModel",
    "AutoModelForCausalLM": "modeling_mesh.MeshForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mesh.MeshForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_mesh.MeshForTokenClassification",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
SCHEMES = (
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
    "adapter",
    "decay",
    "hyper",
    "hyper-dynamic",
    "attend",
)


class MeshConfig(PreTrainedConfig):
    """A prelude of P layers, a core of C layers that runs K times, a coda of Q layers, on a GPT-NeoX backbone.

    Recurrence:
        num_prelude_layers, num_core_layers, num_loops, num_coda_layers: P, C, K and Q. K = 0 is a plain model.
        share_core: all loops run the same C layers; otherwise each loop has its own.
        recurrence: how state passes between loops, one of ``SCHEMES`` ("MeSH: Memory-as-State-Highways for Recursive
            Transformers", arXiv 2510.07739, Sections 3.1, 3.2, Appendix E).
        num_trained_loops: K that the model's parameters are made for; default num_loops. A shared core may run
            num_loops times instead: see ``own_cycle``.
        num_memory_slots: slots M of mesh; default num_trained_loops + 3.
        router_input: routers read the state that enters a block, or a LayerNorm (normalized) or RMSNorm (rmsnorm) of
            it without parameters.
        router_gate: weights of slots are a softmax of a router's logits, or a sigmoid of each.
        router_temperature: the logits are divided by it.
        router_scale: initial value of a learned factor of the logits' part that depends on the state; None for none.
        decay_input: matrix of decay that h(0) is multiplied by, a number per channel or a matrix.
        hyper_lanes: lanes of state of hyper and hyper-dynamic.
        loop_norm, loop_embedding: RMSNorm of the state that enters a loop; a vector of each loop that is added to it.
        per_loop_norms: norms of core layers have weights of each loop.
        loop_lora_rank: rank of a difference B_t A_t of each trained loop in the core's linear layers; None for none.
        share_kv_across_loops: loops after the first attend to the keys and values that the same core layer computed in
            the first; the key-value cache has one entry per core layer. With a shared core only.
        exit_gate: a linear layer computes from the state after each loop the probability that a token leaves the core.
        sandwich_norm: norms of what attention and feed-forward layer return, before it is added to the state.
        embedding_scaling: multiply embeddings by sqrt(hidden_size).

    Backbone:
        head_dim: width of a head; default hidden_size / num_attention_heads.
        num_key_value_heads: grouped-query attention; default one per attention head.
        intermediate_size: width of the feed-forward layer; default 4 * hidden_size.
        parallel_residual: ``x + attn(ln1(x)) + mlp(ln2(x))``; otherwise one after the other.
        normalization: LayerNorm or RMSNorm.
        qk_layernorm: normalise each head's queries and keys before their rotation.
        swiglu: gated SiLU feed-forward instead of exact GELU.
        linear_bias, qkv_bias: biases in linear layers; in that of queries, keys and values (default as in the others).
        rotary_percent, rotary_base: share of a head's channels that is rotated, base of the frequencies.
        rotary_scaling: frequencies for longer texts than in training, as transformers' ``rope_parameters``, one of
            ``ROPE_TYPES``; setting ``rope_parameters`` sets these three.
        hidden_dropout, attention_dropout: share of values (after the embedding and in both branches of a layer) and of
            attention weights that training drops.

    Inference:
        kv_cache_loops: "all" keeps keys and values of every computed layer; "last" keeps only the last loop's for a
            shared core (less memory, not the same function: see docs/huggingface.md of mesh_megatron). No effect with
            share_kv_across_loops.
        exit_criterion, exit_threshold: a token leaves the core after a loop that changed it by less than the threshold:
            "change" |x' - x| / |x'| of the state that would enter the coda, "kl" KL(p' || p) of this state read
            out by final norm and output matrix. "gate": after the first loop at which the probability to have left,
            by the exit gate, reaches the threshold (at most 1). None: every token runs all loops.
    """

    model_type = "mesh"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "exit_loops"]  # the cache by both of its names

    vocab_size: int = 50304
    hidden_size: int = 768
    num_prelude_layers: int = 2
    num_core_layers: int = 4
    num_loops: int = 2
    num_trained_loops: int = None  # type: ignore[assignment]
    num_coda_layers: int = 2
    share_core: bool = True
    recurrence: str = "mesh"
    num_memory_slots: int = None  # type: ignore[assignment]
    router_input: Literal["state", "normalized", "rmsnorm"] = "state"
    router_gate: Literal["softmax", "sigmoid"] = "softmax"
    router_temperature: float = 1.0
    router_scale: float | None = None
    decay_input: Literal["diagonal", "linear"] = "diagonal"
    hyper_lanes: int = 2
    loop_norm: bool = False
    loop_embedding: bool = False
    per_loop_norms: bool = False
    loop_lora_rank: int | None = None
    share_kv_across_loops: bool = False
    exit_gate: bool = False
    sandwich_norm: bool = False
    embedding_scaling: bool = True

    num_attention_heads: int = 12
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    intermediate_size: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 2048
    parallel_residual: bool = True
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    qk_layernorm: bool = False
    norm_epsilon: float = 1e-5
    swiglu: bool = False
    linear_bias: bool = True
    qkv_bias: bool = None  # type: ignore[assignment]
    rotary_percent: float = 0.25
    rotary_base: float = 10000.0
    rotary_scaling: dict | None = None
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    kv_cache_loops: Literal["all", "last"] = "all"
    exit_criterion: Literal["change", "kl", "gate"] | None = None
    exit_threshold: float = 0.0

    def __post_init__(self, **kwargs):
        self.num_trained_loops = self.num_trained_loops or self.num_loops
        self.num_memory_slots = self.num_memory_slots or self.num_trained_loops + 3
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.qkv_bias = self.linear_bias if self.qkv_bias is None else self.qkv_bias
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.base_model_tp_plan = {  # type: ignore[misc]
            f"{segment}.*.{name}": style
            for segment in ("prelude", "core", "coda")
            if segment != "core" or self.loop_lora_rank is None  # transformers cannot split differences of loops
            for name, style in self._layer_tp_plan().items()
        }
        # Three lists of layers, one of which runs several times: vLLM refuses to cut this into pipeline stages.
        self.base_model_pp_plan = {  # type: ignore[misc]
            segment: (["hidden_states"], ["hidden_states"]) for segment in ("prelude", "core", "coda")
        }
        stored_layers = kwargs.pop("num_hidden_layers", None)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        if self.recurrence not in SCHEMES:
            raise ValueError(f"recurrence {self.recurrence!r} is not one of {', '.join(SCHEMES)}")
        if self.kv_cache_loops not in ("all", "last"):
            raise ValueError(f"kv_cache_loops {self.kv_cache_loops!r} is neither 'all' nor 'last'")
        if self.loop_lora_rank is not None and not (self.share_core and self.loop_lora_rank > 0):
            raise ValueError(
                f"loop_lora_rank {self.loop_lora_rank}: at least 1, and with a shared core (share_core) only"
            )
        if self.share_kv_across_loops and not (self.share_core and self.num_loops > 0):
            raise ValueError("share_kv_across_loops needs a shared core (share_core) that runs at least once")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if stored_layers is not None:
            self.num_hidden_layers = stored_layers

    def own_cycle(self, cycle: int) -> int:
        """Return the cycle whose own parameters ``cycle`` (0..num_loops) takes, of those that were trained.

        The last cycle, which leads to the coda, takes those of the last trained cycle. The others take their own as
        long as there are; later ones take those of the last trained cycle that led back to the core.
        """
        trained = self.num_trained_loops
        return trained if cycle == self.num_loops else min(cycle, max(trained - 1, 1))

    def check_loops(self) -> None:
        """Raise ``ValueError`` if the core cannot run ``num_loops`` times."""
        loops, trained = self.num_loops, self.num_trained_loops
        if loops != trained and (loops < 1 or not self.share_core or trained == 0):
            raise ValueError(
                f"num_loops {loops}: the model was made for {trained}; only a shared core (share_core) runs another "
                "number of times, at least once"
            )

    def check_exits(self) -> None:
        """Raise ``ValueError`` if tokens cannot leave the core as ``exit_criterion`` says."""
        criterion, threshold = self.exit_criterion, self.exit_threshold
        if criterion is None:
            if threshold:
                raise ValueError(f"exit_threshold {threshold} needs an exit_criterion: 'change', 'kl' or 'gate'")
            return
        if criterion not in ("change", "kl", "gate"):
            raise ValueError(f"exit_criterion {criterion!r} is neither 'change' nor 'kl' nor 'gate'")
        if criterion == "gate" and not self.exit_gate:
            raise ValueError("exit_criterion 'gate' needs a trained exit gate (exit_gate): use 'change' or 'kl'")
        if criterion == "gate" and threshold > 1:
            raise ValueError(f"exit_threshold {threshold} with exit_criterion 'gate' is a probability: use at most 1")
        if not threshold > 0:
            raise ValueError(f"exit_threshold {threshold} must be above 0 with exit_criterion {criterion!r}")
        if not self.share_core or self.num_loops < 1:
            raise ValueError(f"exit_criterion {criterion!r} needs a shared core: this model has none")
        if self.kv_cache_loops != "all":
            raise ValueError(f"exit_criterion {criterion!r} needs kv_cache_loops 'all', not {self.kv_cache_loops!r}")

    def _layer_tp_plan(self) -> dict[str, str]:
        """Return how transformers and vLLM split each matrix of a layer over tensor-parallel ranks."""
        plan = {"attention.query_key_value": "colwise", "attention.dense": "rowwise"}
        if not self.swiglu:
            return plan | {"mlp.dense_h_to_4h": "colwise", "mlp.dense_4h_to_h": "rowwise"}
        # Rows split in order part each gate from its value, so ranks gather them before they are multiplied.
        # "packed_colwise" would save that, but vLLM does not know it, and transformers misplaces its bias.
        return plan | {"mlp.dense_h_to_4h": "colwise_gather_output", "mlp.dense_4h_to_h": "rowwise_split_input"}

    @property
    def num_computed_layers(self) -> int:
        """N_compute = P + C*K + Q."""
        return self.num_prelude_layers + self.num_core_layers * self.num_loops + self.num_coda_layers

    @property
    def keeps_last_loop_only(self) -> bool:
        """True if the cache holds one entry per core layer instead of one per core layer and loop."""
        last = self.kv_cache_loops == "last" and not self.share_kv_across_loops
        return last and self.share_core and self.num_loops > 1

    @property
    def num_attentions(self) -> int:
        """Number of modules that attend: one per computed layer, or per layer if loops share keys and values."""
        if self.share_kv_across_loops:
            return self.num_prelude_layers + self.num_core_layers + self.num_coda_layers
        return self.num_computed_layers

    @property
    def num_hidden_layers(self) -> int:
        """Number of key-value cache entries, for which cache classes read this property: one per module that attends.

        One per layer with ``kv_cache_loops`` "last".
        """
        if self.keeps_last_loop_only:
            return self.num_prelude_layers + self.num_core_layers + self.num_coda_layers
        return self.num_attentions

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        if value != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers {value} cannot be set: it counts key-value cache entries, {self.num_hidden_layers} "
                f"with num_prelude_layers {self.num_prelude_layers}, num_core_layers {self.num_core_layers}, num_loops "
                f"{self.num_loops}, num_coda_layers {self.num_coda_layers} and kv_cache_loops {self.kv_cache_loops!r}; "
                "leave it out"
            )

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Rotary positions as transformers names them."""
        common = {"rope_type": "default", "rope_theta": self.rotary_base, "partial_rotary_factor": self.rotary_percent}
        return common | (self.rotary_scaling or {})

    @rope_parameters.setter
    def rope_parameters(self, value: dict[str, Any] | None) -> None:
        given = dict(value or {})
        kind = given.setdefault("rope_type", given.pop("type", "default"))
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_parameters: rope_type {kind!r} is not one of {', '.join(ROPE_TYPES)}")
        self.rotary_base = float(given.pop("rope_theta", self.rotary_base))
        self.rotary_percent = float(given.pop("partial_rotary_factor", self.rotary_percent))
        self.rotary_scaling = None if kind == "default" else given

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, with ``num_hidden_layers`` for those who read config.json without this class."""
        return super().to_dict() | {"num_hidden_layers": self.num_hidden_layers}


__all__ = ["MeshConfig"]
