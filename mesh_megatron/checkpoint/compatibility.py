"""Check that a checkpoint holds the model that the settings describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mesh_megatron.checkpoint.folder import CONFIG, read_run_config
from mesh_megatron.config import cli
from mesh_megatron.config.bounds import flag
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.recurrence import scheme_settings, scheme_spec

FREE_MODEL_FIELDS = (
    "num_layers",  # compared as the layout
    "group_query_attention",  # compared as the number of groups
    "seq_length",
    "max_position_embeddings",
    "router_init",
    "router_bias",
    "router_init_std",
    "router_z_loss",
    "router_entropy_loss",
    "exit_entropy_coeff",
    "exit_gate_only",
    "exit_improvement_slope",
    "exit_improvement_threshold",
    "loop_loss_weights",
    "init_method_std",
    "embedding_init_method_std",
    "hidden_dropout",
    "attention_dropout",
    "padded_vocab_size",  # compared as the rows it resolves to
    "make_vocab_size_divisible_by",
    "memory_kernel",
    "loss_kernel",
    "loss_chunk_tokens",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
)
"""Model settings that may differ between two runs of the same model."""
# Settings whose default follows from others.
_DERIVED = ("ffn_hidden_size", "num_query_groups", "kv_channels", "moe_ffn_hidden_size")


def check_same_model(checkpoint: Path, model: ModelConfig, vocabulary: int, finetune: bool = False) -> None:
    """Raise ``ValueError`` that lists every model setting in which the checkpoint differs from ``model``.

    ``vocabulary`` is the padded number of rows of the embedding; with ``finetune`` the checkpoint may lack a gate.
    """
    record = read_run_config(checkpoint)
    try:
        settings, rows = record["model"], record["resolved"]["padded_vocab_size"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint / CONFIG} is damaged: it names no model and vocabulary") from error
    saved = cli.from_dict(ModelConfig, settings, str(checkpoint))
    theirs, ours = (_comparable(config) for config in (saved, model))
    if finetune and ours["exit_gate"]:
        theirs["exit_gate"] = True
    theirs["padded_vocab_size"], ours["padded_vocab_size"] = rows, vocabulary
    other = [name for name in ours if theirs[name] != ours[name]]
    # A value that follows from another setting on both sides: the other one is what differs.
    chosen = [name for name in other if name not in _DERIVED or getattr(saved, name) != getattr(model, name)]
    if other:
        differences = [f"{flag(name)} {theirs[name]} there, {ours[name]} here" for name in chosen or other]
        raise ValueError(
            f"{checkpoint} holds another model: {'; '.join(differences)}: give the model's flags as they were, or "
            "another --save and --load"
        )


def _comparable(config: ModelConfig) -> dict[str, Any]:
    fields = {name: value for name, value in cli.to_dict(config).items() if name not in FREE_MODEL_FIELDS}
    defaults = {
        "layout": str(config.segments),
        **dict.fromkeys(scheme_settings(config)),
        **scheme_spec(config).settings(),
        "ffn_hidden_size": config.ffn_size,
        "num_query_groups": config.query_groups,
        "kv_channels": config.head_size,
        "moe_ffn_hidden_size": config.expert_ffn_size,
    }
    compared = fields | defaults
    # where the factor started makes no other model; that there is one does
    return compared | {"router_scale": compared["router_scale"] is not None}
