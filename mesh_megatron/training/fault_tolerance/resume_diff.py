"""The settings and data files that have changed since the checkpoint that a run continues; changes are allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mesh_megatron.checkpoint.folder import read_run_config
from mesh_megatron.config import cli
from mesh_megatron.config.bounds import flag
from mesh_megatron.config.run import RunConfig

# Settings without an effect on losses and weights.
_WITHOUT_EFFECT = {
    "check_weight_hash_across_dp_replicas_interval",
    "data_cache_path",
    "eval_interval",
    "eval_only",
    "exit_duration_in_mins",
    "exit_interval",
    "manual_gc",
    "manual_gc_interval",
    "num_dataset_builder_threads",
    "num_workers",
}


def changes_since(checkpoint: Path, run: RunConfig, resolved: dict[str, Any]) -> list[str]:
    """Return a line for each setting of training and data, and each data file, that has changed since ``checkpoint``.

    ``resolved`` holds the present values that are derived from the settings; see ``Checkpointer``.
    """
    record, now = read_run_config(checkpoint), cli.to_dict(run)
    there, here = record["resolved"], resolved
    pairs = {
        flag(name): (record[group].get(name, value), value)
        for group in ("training", "data")
        for name, value in now[group].items()
        if name not in _WITHOUT_EFFECT
    }
    pairs["--seq-length"] = (record["model"]["seq_length"], run.model.seq_length)
    batch, files = here["global_batch_size"], here["data_files"]
    pairs["--global-batch-size"] = (there.get("global_batch_size", batch), batch)
    pairs |= {name: (there.get("data_files", {}).get(name, content), content) for name, content in files.items()}
    texts = {name: (_plain(old), _plain(new)) for name, (old, new) in pairs.items()}
    return [f"{name} {old} -> {new}" for name, (old, new) in texts.items() if old != new]


def _plain(value: Any) -> str:
    """Return the value as text that is the same before and after a round trip through JSON."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
