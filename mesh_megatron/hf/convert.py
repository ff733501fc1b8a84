"""Convert tensor names and configurations between checkpoints and Hugging Face.

A checkpoint and an exported model hold the same tensors in the same order of rows, so converting is renaming (the
fused query-key-value matrix of Megatron is also GPT-NeoX's, and grouped-query attention keeps that order here). The
one exception: native ``gpt_neox`` does not scale embeddings, so their scale of sqrt(D) goes into the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import GPTNeoXConfig, PreTrainedConfig

from mesh_megatron.config.layout import Layout
from mesh_megatron.config.model import LLAMA3_SCALING, ModelConfig
from mesh_megatron.config.recurrence import scheme_settings, scheme_spec
from mesh_megatron.hf.configuration_mesh import MeshConfig

# Checkpoint's name -> Hugging Face's, inside one layer.
LAYER_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "self_attention.linear_qkv.weight": "attention.query_key_value.weight",
    "self_attention.linear_qkv.bias": "attention.query_key_value.bias",
    "self_attention.q_layernorm.weight": "attention.q_layernorm.weight",
    "self_attention.q_layernorm.bias": "attention.q_layernorm.bias",
    "self_attention.k_layernorm.weight": "attention.k_layernorm.weight",
    "self_attention.k_layernorm.bias": "attention.k_layernorm.bias",
    "self_attention.linear_proj.weight": "attention.dense.weight",
    "self_attention.linear_proj.bias": "attention.dense.bias",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "post_attention_layernorm.bias",
    "mlp.linear_fc1.weight": "mlp.dense_h_to_4h.weight",
    "mlp.linear_fc1.bias": "mlp.dense_h_to_4h.bias",
    "mlp.linear_fc2.weight": "mlp.dense_4h_to_h.weight",
    "mlp.linear_fc2.bias": "mlp.dense_4h_to_h.bias",
}
LAYER_NAMES |= {
    f"{ours.removesuffix('weight')}loop_{part}": f"{theirs.removesuffix('.weight')}_difference.{part}"
    for ours, theirs in LAYER_NAMES.items()
    if ".linear_" in ours and ours.endswith(".weight")
    for part in ("down", "up")
} | {
    f"{branch}_output_layernorm.{kind}": f"{branch}_output_layernorm.{kind}"
    for branch in ("attention", "mlp")
    for kind in ("weight", "bias")
}
# Additional tensors and other names in published gpt_neox files.
_NEOX_BUFFERS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")
_NEOX_ALIASES = {"lm_head.weight": "embed_out.weight"}


def reason_not_native(model: ModelConfig) -> str | None:
    """Return why ``gpt_neox`` of transformers cannot represent this model, or None if it can."""
    layout = model.segments
    if model.scheme != "base":
        return f"--recurrence {model.recurrence} passes state between loops"
    if model.loop_norm or model.loop_embedding:
        return "it changes the state that enters a loop (--loop-norm or --loop-embedding)"
    if model.loop_lora_rank is not None:
        return "the matrices of its loops differ (--loop-lora-rank)"
    if model.exit_gate:
        return "it has an exit gate (--exit-gate)"
    if model.per_loop_norms:
        return "its loops have norms of their own (--per-loop-norms)"
    if model.sandwich_norm:
        return "its layers also norm what their branches return (--sandwich-norm)"
    if layout.shared and layout.loops > 1:
        return f"--layout {model.layout} runs its core {layout.loops} times"
    if model.normalization != "LayerNorm" or model.swiglu or model.disable_bias_linear:
        return "its layers are not GPT-NeoX's (RMSNorm, SwiGLU or no biases)"
    if model.qk_layernorm:
        return "it normalises queries and keys (--qk-layernorm)"
    if (
        model.query_groups != model.num_attention_heads
        or model.head_size * model.num_attention_heads != model.hidden_size
    ):
        return "its attention heads are not GPT-NeoX's (--num-query-groups or --kv-channels)"
    if model.embedding_scaling and not model.untie_embeddings_and_output_weights:
        return "the scaled embedding is also the output matrix, which gpt_neox cannot express"
    return None


@dataclass(frozen=True)
class StateDictAdapter:
    """Converts the tensors of one model, one by one, between a checkpoint and a Hugging Face state dict.

    ``vocabulary`` is the embedding's number of rows; ``native`` asks for the names of ``gpt_neox``.
    """

    model: ModelConfig
    vocabulary: int
    native: bool

    def __post_init__(self) -> None:
        if self.model.num_experts is not None:
            raise ValueError(
                f"--num-experts {self.model.num_experts}: a core of experts has no Hugging Face form here; evaluate it "
                "with pretrain_mesh.py --eval-only"
            )

    @cached_property
    def layers(self) -> list[tuple[str, int]]:
        """List (segment, index) of every layer with its own weights, in the order of computation."""
        layout = self.model.segments
        depths = {"prelude": layout.prelude, "core": layout.unique_core_layers, "coda": layout.coda}
        return [(segment, index) for segment, depth in depths.items() for index in range(depth)]

    @cached_property
    def names(self) -> dict[str, str]:
        """Checkpoint key -> Hugging Face name, in the order of computation."""
        base = "gpt_neox" if self.native else "model"
        names = {"embedding.word_embeddings.weight": f"{base}.embed_in.weight"}
        for number, (segment, index) in enumerate(self.layers):
            layer = f"{base}.layers.{number}" if self.native else f"{base}.{segment}.{index}"
            names |= {f"{segment}.layers.{index}.{key}": f"{layer}.{name}" for key, name in LAYER_NAMES.items()}
        names |= {
            f"recurrence.{name}": f"{base}.recurrence.{name}" for name in scheme_spec(self.model).all_parameters()
        }
        names |= {f"final_norm.{kind}": f"{base}.final_layer_norm.{kind}" for kind in ("weight", "bias")}
        names["output_layer.weight"] = "embed_out.weight" if self.native else "lm_head.weight"
        return {key: name for key, name in names.items() if key in self.shapes}

    @cached_property
    def keys(self) -> dict[str, str]:
        """Hugging Face name -> checkpoint key."""
        return {name: key for key, name in self.names.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint key -> shape: exactly the tensors this model has."""
        model, hidden = self.model, self.model.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (self.vocabulary, hidden)}
        for segment, index in self.layers:
            shapes |= {f"{segment}.layers.{index}.{key}": shape for key, shape in _layer_shapes(model, segment).items()}
        shapes |= {f"recurrence.{name}": p.shape for name, p in scheme_spec(model).all_parameters().items()}
        shapes["final_norm.weight"] = (hidden,)
        if model.normalization == "LayerNorm":
            shapes["final_norm.bias"] = (hidden,)
        if model.untie_embeddings_and_output_weights:
            shapes["output_layer.weight"] = (self.vocabulary, hidden)
        return shapes

    def to_hf(self, key: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[str, torch.Tensor]:
        """Convert a checkpoint's key and tensor to Hugging Face's, in ``dtype`` (recurrence tensors stay float32)."""
        if self.native and self.model.embedding_scaling and key == "embedding.word_embeddings.weight":
            tensor = (tensor.float() * math.sqrt(self.model.hidden_size)).to(tensor.dtype if dtype is None else dtype)
        if dtype is not None and not key.startswith("recurrence."):
            tensor = tensor.to(dtype)
        return self.names[key], tensor

    def from_hf(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Convert a Hugging Face name and tensor to the checkpoint's key and tensor."""
        if self.native and self.model.embedding_scaling:
            raise ValueError("a gpt_neox model has no embedding scaling: convert it with embedding_scaling=False")
        key = self.keys[_NEOX_ALIASES.get(name, name) if self.native else name]
        return key, tensor.float() if key.startswith("recurrence.") else tensor

    def sources(self, found: Mapping[str, tuple[int, ...]], where: str) -> dict[str, str]:
        """Checkpoint key -> the name in ``found`` (name -> shape) that holds it.

        Raises ``ValueError`` if ``found`` lacks a tensor, or has an unknown one or one with another shape.
        """
        if self.native:
            found = {name: shape for name, shape in found.items() if not name.endswith(_NEOX_BUFFERS)}
        by_name = {(_NEOX_ALIASES.get(name, name) if self.native else name): name for name in found}
        if not self.model.untie_embeddings_and_output_weights:
            for copy in ("lm_head.weight", "embed_out.weight"):  # some writers store the tied matrix twice
                by_name.pop(copy, None)
        names = self.names
        check_tensors(
            {names[key]: shape for key, shape in self.shapes.items()},
            {name: found[original] for name, original in by_name.items()},
            where,
        )
        return {key: by_name[name] for key, name in names.items()}


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ``ValueError`` that names missing, unknown and misshapen tensors in ``found`` (name -> shape)."""
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{where}: missing {_some(missing)}")
    if unknown := [name for name in found if name not in expected]:
        raise ValueError(f"{where}: holds {_some(unknown)}, which the model it describes has not")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise ValueError(f"{where}: {name} is {list(found[name])}, the model it describes needs {list(shape)}")


def to_hf_config(model: ModelConfig, vocabulary: int, eod: int | None, native: bool) -> PreTrainedConfig:
    """Build the configuration of the exported model; ``eod`` is the id of the end-of-document token, or None."""
    positions = model.max_position_embeddings or model.seq_length
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": positions,
        "initializer_range": model.init_method_std,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "pad_token_id": eod,
    }
    layout = model.segments
    if native:
        rope = {"rope_type": "default", "rope_theta": model.rotary_base, "partial_rotary_factor": model.rotary_percent}
        rope |= model.rotary_scaling or {}
        return GPTNeoXConfig(
            **common,
            num_hidden_layers=layout.computed_layers,
            layer_norm_eps=model.norm_epsilon,
            use_parallel_residual=model.parallel_residual,
            rope_parameters=rope,
            architectures=["GPTNeoXForCausalLM"],
        )
    return MeshConfig(
        **common,
        num_prelude_layers=layout.prelude,
        num_core_layers=layout.core,
        num_loops=layout.loops,
        num_coda_layers=layout.coda,
        share_core=layout.shared,
        recurrence=model.scheme,
        **scheme_settings(model),
        loop_norm=model.loop_norm,
        loop_embedding=model.loop_embedding,
        per_loop_norms=model.per_loop_norms,
        loop_lora_rank=model.loop_lora_rank,
        share_kv_across_loops=model.share_kv_across_loops,
        exit_gate=model.exit_gate,
        sandwich_norm=model.sandwich_norm,
        embedding_scaling=model.embedding_scaling,
        num_key_value_heads=model.query_groups,
        head_dim=model.head_size,
        parallel_residual=model.parallel_residual,
        normalization=model.normalization,
        qk_layernorm=model.qk_layernorm,
        norm_epsilon=model.norm_epsilon,
        swiglu=model.swiglu,
        linear_bias=not model.disable_bias_linear,
        qkv_bias=model.qkv_bias,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rotary_scaling=model.rotary_scaling,
        architectures=["MeshForCausalLM"],
    )


def from_hf_config(content: Mapping[str, Any], where: str) -> tuple[ModelConfig, bool]:
    """Return the model that a ``config.json`` describes, and whether it is a native ``gpt_neox``.

    Raises ``ValueError`` for an architecture or an option that cannot be trained here.
    """
    kind = content.get("model_type")
    if kind not in ("mesh", "gpt_neox"):
        raise ValueError(f"{where}: model_type {kind!r} cannot be imported; gpt_neox and mesh (our exports) can")
    try:
        config = MeshConfig(**content) if kind == "mesh" else GPTNeoXConfig(**content)
    except Exception as error:  # transformers raises a different class for each check
        raise ValueError(f"{where}: config.json does not describe a {kind}: {' '.join(str(error).split())}") from error
    model = _from_mesh(config, where) if isinstance(config, MeshConfig) else _from_neox(config, where)
    model.validate()
    return model, kind == "gpt_neox"


def _from_mesh(config: MeshConfig, where: str) -> ModelConfig:
    layout = Layout(
        config.num_prelude_layers,
        config.num_core_layers,
        config.num_trained_loops,
        config.num_coda_layers,
        config.share_core,
    )
    unshared = {"base": "vanilla", "mesh": "vanilla+mesh"}
    recurrence = config.recurrence if layout.shared else unshared.get(config.recurrence, config.recurrence)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    model = ModelConfig(
        layout=str(layout),
        recurrence=recurrence,  # type: ignore[arg-type]
        num_query_groups=None if groups == heads else groups,
        kv_channels=None if config.head_dim * heads == config.hidden_size else config.head_dim,
        normalization=config.normalization,
        qk_layernorm=config.qk_layernorm,
        norm_epsilon=config.norm_epsilon,
        parallel_residual=config.parallel_residual,
        swiglu=config.swiglu,
        disable_bias_linear=not config.linear_bias,
        add_qkv_bias=config.qkv_bias and not config.linear_bias,
        rotary_percent=config.rotary_percent,
        rotary_base=whole_rotary_base(config.rotary_base, where),
        **_rotary_scaling(config.rope_parameters, where),
        loop_norm=config.loop_norm,
        loop_embedding=config.loop_embedding,
        per_loop_norms=config.per_loop_norms,
        loop_lora_rank=config.loop_lora_rank,
        share_kv_across_loops=config.share_kv_across_loops,
        exit_gate=config.exit_gate,
        sandwich_norm=config.sandwich_norm,
        embedding_scaling=config.embedding_scaling,
        **_common_fields(config),
    )
    defaults = scheme_spec(model).settings()
    return replace(model, **{n: getattr(config, n) for n, value in defaults.items() if getattr(config, n) != value})


def _from_neox(config: GPTNeoXConfig, where: str) -> ModelConfig:
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    refused = {
        "hidden_act": (config.hidden_act, "gelu"),
        "attention_bias": (config.attention_bias, True),
    }
    for name, (value, wanted) in refused.items():
        if value != wanted:
            raise ValueError(f"{where}: {name} {value!r} cannot be trained here, only {wanted!r}")
    return ModelConfig(
        layout=str(config.num_hidden_layers),
        recurrence="vanilla",
        norm_epsilon=config.layer_norm_eps,
        parallel_residual=config.use_parallel_residual,
        rotary_percent=rope["partial_rotary_factor"],
        rotary_base=whole_rotary_base(rope["rope_theta"], where),
        **_rotary_scaling(rope, where),
        embedding_scaling=False,
        **_common_fields(config),
    )


def whole_rotary_base(base: float, where: str) -> int:
    """Return the base of the rotary frequencies as ``--rotary-base`` takes it; ``ValueError`` if it has a fraction."""
    if base != int(base):
        raise ValueError(f"{where}: rotary base {base} cannot be trained here: --rotary-base is a whole number")
    return int(base)


def _rotary_scaling(rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings that scale rotary frequencies as ``rope_parameters`` say; ``ValueError`` if none do."""
    kind, factor = rope["rope_type"], rope.get("factor")
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rotary_seq_len_interpolation_factor": factor}
    if kind == "llama3" and all(rope.get(name) == value for name, value in LLAMA3_SCALING.items()):
        return {"use_rope_scaling": True, "rope_scaling_factor": factor}
    shown = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    raise ValueError(
        f"{where}: rope_parameters {shown} cannot be trained here, only linear, and llama3 as Llama 3.1 has it"
    )


def _common_fields(config: Any) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "ffn_hidden_size": None if config.intermediate_size == 4 * config.hidden_size else config.intermediate_size,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "init_method_std": config.initializer_range,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "padded_vocab_size": config.vocab_size,
    }


def _layer_shapes(model: ModelConfig, segment: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of one layer of ``segment``, by checkpoint key."""
    hidden, heads = model.hidden_size, model.num_attention_heads + 2 * model.query_groups
    linears = {
        "self_attention.linear_qkv": (heads * model.head_size, hidden),
        "self_attention.linear_proj": (hidden, model.num_attention_heads * model.head_size),
        "mlp.linear_fc1": (model.ffn_size * (2 if model.swiglu else 1), hidden),
        "mlp.linear_fc2": (hidden, model.ffn_size),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in linears.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if model.qkv_bias if name.endswith("linear_qkv") else not model.disable_bias_linear:
            shapes[f"{name}.bias"] = (rows,)
        if (rank := model.loop_lora_rank) is not None and segment == "core":
            loops = model.segments.loops
            outputs = (2, model.ffn_size) if name == "mlp.linear_fc1" and model.swiglu else (rows,)
            shapes |= {f"{name}.loop_down": (loops, rank, columns), f"{name}.loop_up": (loops, *outputs, rank)}
    each = (model.segments.loops,) if model.per_loop_norms and segment == "core" else ()
    norms = {f"{name}.layer_norm_": (*each, hidden) for name in ("self_attention.linear_qkv", "mlp.linear_fc1")}
    if model.sandwich_norm:
        norms |= {f"{branch}_output_layernorm.": (*each, hidden) for branch in ("attention", "mlp")}
    if model.qk_layernorm:
        norms |= {f"self_attention.{name}_layernorm.": (model.head_size,) for name in ("q", "k")}
    for name, shape in norms.items():
        shapes[f"{name}weight"] = shape
        if model.normalization == "LayerNorm":
            shapes[f"{name}bias"] = shape
    return shapes


def _some(names: list[str]) -> str:
    """Format the first three of ``names`` and the number of others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
