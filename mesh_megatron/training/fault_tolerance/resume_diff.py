"""The settings and data files that have changed since the checkpoint that a run continues; changes are allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mesh_megatron.checkpoint.compatibility import FREE_MODEL_FIELDS
from mesh_megatron.checkpoint.folder import read_run_config
from mesh_megatron.config import cli
from mesh_megatron.config.bounds import flag
from mesh_megatron.config.run import RunConfig

# Settings without an effect on the losses and weights of further steps.
_WITHOUT_EFFECT = {
    "check_weight_hash_across_dp_replicas_interval",
    "data_cache_path",
    "embedding_init_method_std",
    "eval_interval",
    "eval_only",
    "exit_duration_in_mins",
    "exit_interval",
    "group_query_attention",
    "init_method_std",
    "loss_chunk_tokens",
    "loss_kernel",
    "make_vocab_size_divisible_by",
    "manual_gc",
    "manual_gc_interval",
    "max_position_embeddings",
    "memory_kernel",
    "num_dataset_builder_threads",
    "num_layers",
    "num_workers",
    "padded_vocab_size",
    "router_bias",
    "router_init",
    "router_init_std",
}


def changes_since(checkpoint: Path, run: RunConfig, resolved: dict[str, Any]) -> list[str]:
    """Return a line for each setting with an effect, and each data file, that has changed since ``checkpoint``.

    ``resolved`` holds the present values that are derived from the settings; see ``Checkpointer``. What an older
    version did not record counts as unchanged.
    """
    record, now = read_run_config(checkpoint), cli.to_dict(run)
    there, here = record["resolved"], resolved
    names = {group: list(now[group]) for group in ("training", "data", "loops")}
    names |= {"model": [*FREE_MODEL_FIELDS], "parallel": ["grad_reduce_in_bf16"]}
    pairs = {
        flag(name): (record.get(group, {}).get(name, now[group][name]), now[group][name])
        for group in names
        for name in names[group]
        if name not in _WITHOUT_EFFECT
    }
    batch, files = here["global_batch_size"], here["data_files"]
    pairs["--global-batch-size"] = (there.get("global_batch_size", batch), batch)
    pairs |= {name: (there.get("data_files", {}).get(name, content), content) for name, content in files.items()}
    texts = {name: (_plain(old), _plain(new)) for name, (old, new) in pairs.items()}
    return [f"{name} {old} -> {new}" for name, (old, new) in texts.items() if old != new]


def _plain(value: Any) -> str:
    """Return the value as text that is the same before and after a round trip through JSON."""
    return " ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)
