"""Read a GPT checkpoint that Megatron-LM wrote (``torch_dist``) as a plain model to import."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mesh_megatron.checkpoint.folder import CONFIG
from mesh_megatron.checkpoint.reader import find_checkpoint
from mesh_megatron.checkpoint.safe_unpickling import SafeReader, is_scales
from mesh_megatron.checkpoint.stored_arguments import stored_arguments
from mesh_megatron.config.bounds import flag
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.hf.convert import StateDictAdapter, check_tensors, whole_rotary_base
from mesh_megatron.hf.import_options import Given

# What a training checkpoint holds besides the model.
_STATE = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", "common_state")
# A layer's norms, if they are saved under their own names and not under those of the linear layer that follows them.
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_HALVES = {"_w": 0, "_v": 1}  # fully sharded runs save gate and value of SwiGLU apart
_OUTSIDE_LAYERS = {
    "embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
    "final_norm.weight": "decoder.final_layernorm.weight",
    "final_norm.bias": "decoder.final_layernorm.bias",
    "output_layer.weight": "output_layer.weight",
}
# Tensors of models that cannot be expressed here -> what they belong to.
_FOREIGN = {
    r"embedding\.position_embeddings\.": "learned positions (only --position-embedding-type rope trains here)",
    r"\.(experts|shared_experts|router)\.": "a mixture of experts (--num-experts) in plain layers",
    r"\.linear_(q|kv|q_up|q_down|kv_up|kv_down)_proj\.": "multi-latent attention (--multi-latent-attention)",
    r"\.mixer\.": "Mamba layers",
    r"(^|\.)mtp\.": "multi-token prediction (--mtp-num-layers)",
    r"\.cross_attention\.": "cross-attention",
}
# Arguments that change what the same tensors compute -> the values that leave it as it is here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "multi_latent_attention": (False, None),
    "num_experts": (None, 0),
    "mtp_num_layers": (None, 0),
    "qk_l2_norm": (False, None),
    "apply_layernorm_1p": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "attention_output_gate": (False, None),
    "squared_relu": (False, None),
    "openai_gelu": (False, None),
    "onnx_safe": (False, None),
    "quick_geglu": (False, None),
    "glu_linear_offset": (0, None),
    "activation_func_clamp_value": (None,),
    "rotary_interleaved": (False, None),
    "no_rope_freq": (None,),
    "window_size": (None,),
    "softmax_type": ("vanilla", None),
    "heterogeneous_layers_config_path": (None,),
    "experimental_attention_variant": (None,),
    "use_mup": (False, None),
}


class _Place(NamedTuple):
    """Where a tensor lies: an entry of the index, or one layer of an entry that stacks them."""

    entry: str
    layer: int | None


class MegatronModel:
    """A GPT model in a checkpoint of Megatron-LM, as a ``Source`` of ``importing.py``.

    None of its code runs. Raises ``ValueError`` if it is incomplete or damaged, or names what cannot be trained here.
    ``notes`` are sentences about what will differ.
    """

    eod = None

    def __init__(self, load: Path, iteration: int | None = None, given: Given | None = None) -> None:
        self.folder = find_checkpoint(load, iteration)
        _check_format(self.folder)
        self._reader = SafeReader(self.folder)
        self._places = self._scan()
        arguments = stored_arguments(self._reader)
        self._refuse_foreign(arguments)
        self.model = self._settings(arguments, given or Given())
        assert self.model.padded_vocab_size is not None
        self.adapter = StateDictAdapter(self.model, self.model.padded_vocab_size, native=False)
        self._names = {key: self._name(key) for key in self.adapter.shapes}
        self._check_tensors()
        self.notes = _notes(arguments, self.model)

    def read(self, key: str) -> torch.Tensor:
        """Read the tensor of checkpoint key ``key``."""
        parts = [self._reader.read_slice(*place) for place in self._places[self._names[key]]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype in which ``read`` returns ``key``."""
        if key.startswith("recurrence."):
            return torch.float32
        return self._entry(self._places[self._names[key]][0]).properties.dtype

    def _scan(self) -> dict[str, list[_Place]]:
        """Map each tensor's name, with its layer's number, to its place; two for a matrix saved in halves."""
        places: dict[str, dict[int, _Place]] = {}
        for entry, stored in self._reader.index.state_dict_metadata.items():
            if not isinstance(stored, TensorStorageMetadata) or entry.startswith(_STATE) or is_scales(entry):
                continue
            for name, place in _numbered(entry, tuple(stored.size)):
                for old, new in _NORMS.items():
                    name = name.replace(f".{old}", f".{new}")
                half = _HALVES.get(name[-2:])
                places.setdefault(name if half is None else name[:-2], {})[half or 0] = place
        return {name: [parts[half] for half in sorted(parts)] for name, parts in places.items()}

    def _entry(self, place: _Place) -> TensorStorageMetadata:
        entry = self._reader.index.state_dict_metadata[place.entry]
        assert isinstance(entry, TensorStorageMetadata)
        return entry

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._places:
            raise ValueError(f"{self.folder}: holds no {name}, so it is no GPT model of Megatron-LM in torch_dist")
        sizes = [self._entry(place).size[place.layer is not None :] for place in self._places[name]]
        return sum(size[0] for size in sizes), *sizes[0][1:]

    def _refuse_foreign(self, arguments: dict[str, Any]) -> None:
        """Raise ``ValueError`` that names an argument or a tensor of a model that cannot be expressed here."""
        for name, neutral in _NEUTRAL.items():
            if name in arguments and arguments[name] not in neutral:
                raise ValueError(
                    f"{self.folder}: its model was trained with {flag(name)} {arguments[name]}, which cannot be "
                    f"continued here (only {neutral[0]})"
                )
        for name in sorted(self._places):
            for pattern, meaning in _FOREIGN.items():
                if re.search(pattern, name):
                    raise ValueError(f"{self.folder}: {name} is of {meaning}, which has no equal here")

    def _settings(self, arguments: dict[str, Any], given: Given) -> ModelConfig:
        """Derive the settings: from the tensors' shapes if they show them, else from flags or stored arguments."""
        known = {field.name: getattr(given, field.name) for field in fields(given)}
        for name, value in known.items():
            known[name] = arguments.get(name) if value is None else value
        heads = known["num_attention_heads"]
        if heads is None:
            raise ValueError(f"{self.folder}: stores no arguments of Megatron-LM: give --num-attention-heads")
        rows, hidden = self._shape("decoder.layers.0.self_attention.linear_qkv.weight")
        width = self._shape("decoder.layers.0.self_attention.linear_proj.weight")[1]
        gate, ffn = (self._shape(f"decoder.layers.0.mlp.linear_{fc}.weight")[at] for fc, at in (("fc1", 0), ("fc2", 1)))
        groups, odd = divmod(rows - width, 2 * width // heads) if width % heads == 0 else (0, 1)
        if odd:
            raise ValueError(
                f"--num-attention-heads {heads} does not fit linear_qkv of {rows} and linear_proj of {width} channels"
            )
        numbers = {int(name.split(".")[2]) for name in self._places if name.startswith("decoder.layers.")}
        bias_free = "decoder.layers.0.mlp.linear_fc2.bias" not in self._places
        seq_length = known["seq_length"] or ModelConfig.seq_length
        model = ModelConfig(
            layout=str(len(numbers)),
            recurrence="vanilla",
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=None if groups == heads else groups,
            kv_channels=None if width == hidden else width // heads,
            ffn_hidden_size=None if ffn == 4 * hidden else ffn,
            swiglu=gate == 2 * ffn,
            disable_bias_linear=bias_free,
            add_qkv_bias=bias_free and "decoder.layers.0.self_attention.linear_qkv.bias" in self._places,
            normalization="LayerNorm" if "decoder.final_layernorm.bias" in self._places else "RMSNorm",
            norm_epsilon=known["norm_epsilon"] or ModelConfig.norm_epsilon,
            parallel_residual=False,
            rotary_percent=1.0 if known["rotary_percent"] is None else known["rotary_percent"],
            rotary_base=whole_rotary_base(known["rotary_base"] or ModelConfig.rotary_base, f"{self.folder}"),
            use_rope_scaling=bool(arguments.get("use_rope_scaling")),
            rope_scaling_factor=arguments.get("rope_scaling_factor") or ModelConfig.rope_scaling_factor,
            rotary_seq_len_interpolation_factor=arguments.get("rotary_seq_len_interpolation_factor"),
            qk_layernorm="decoder.layers.0.self_attention.q_layernorm.weight" in self._places,
            hidden_dropout=arguments.get("hidden_dropout") or 0.0,
            attention_dropout=arguments.get("attention_dropout") or 0.0,
            embedding_scaling=False,
            untie_embeddings_and_output_weights="output_layer.weight" in self._places,
            seq_length=seq_length,
            max_position_embeddings=arguments.get("max_position_embeddings") or seq_length,
            padded_vocab_size=self._shape("embedding.word_embeddings.weight")[0],
        )
        model.validate()
        return model

    def _name(self, key: str) -> str:
        """Return Megatron-LM's name, with the layer's number, for a checkpoint key."""
        layer = re.fullmatch(r"(\w+)\.layers\.(\d+)\.(.+)", key)
        if layer is None:
            return _OUTSIDE_LAYERS[key]
        return f"decoder.layers.{self.adapter.layers.index((layer[1], int(layer[2])))}.{layer[3]}"

    def _check_tensors(self) -> None:
        expected = {self._names[key]: shape for key, shape in self.adapter.shapes.items()}
        check_tensors(expected, {name: self._shape(name) for name in self._places}, f"{self.folder}")


def _check_format(folder: Path) -> None:
    if (folder / CONFIG).exists():
        raise ValueError(f"{folder}: is a checkpoint of this project: give it to pretrain_mesh.py as --load")
    if not (folder / ".metadata").exists():
        raise ValueError(
            f"{folder}: holds no .metadata, so it is not in the format torch_dist: let Megatron-LM write it again with "
            "--ckpt-convert-format torch_dist"
        )


def _numbered(entry: str, size: tuple[int, ...]) -> list[tuple[str, _Place]]:
    """List name and place of each tensor in an entry: one, or one for each layer that it stacks."""
    stack = re.fullmatch(r"decoder\.layers\.(?!\d+\.)(.+)", entry)
    if stack is None:
        return [(entry, _Place(entry, None))]
    return [(f"decoder.layers.{layer}.{stack[1]}", _Place(entry, layer)) for layer in range(size[0])]


def _notes(arguments: dict[str, Any], model: ModelConfig) -> list[str]:
    if arguments.get("bias_gelu_fusion") and not model.swiglu and not model.disable_bias_linear:
        return ["it was trained with the tanh approximation of GELU (--bias-gelu-fusion); here GELU is exact"]
    return []
