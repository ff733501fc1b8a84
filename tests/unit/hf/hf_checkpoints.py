"""Checkpoints of random tensors, in the trainer's format, written without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from mesh_megatron.checkpoint.reader import without_process_group
from mesh_megatron.config import cli
from mesh_megatron.config.data import DataConfig
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.hf.convert import StateDictAdapter

VOCABULARY = 128


def tiny(**changes: Any) -> ModelConfig:
    options = {
        "layout": "1+2R2+1",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 32,
        "rotary_percent": 0.5,
    }
    return ModelConfig(**{**options, **changes})


def random_tensors(model: ModelConfig, vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """By checkpoint key; norms around one, all else (biases and routers too) around zero."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(shape, generator=generator) * 0.1 + key.endswith(("norm_weight", "final_norm.weight"))
        for key, shape in StateDictAdapter(model, vocabulary, native=False).shapes.items()
    }


def write_checkpoint(
    save: Path,
    model: ModelConfig,
    *,
    iteration: int = 100,
    data: DataConfig | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    **resolved: Any,
) -> dict[str, torch.Tensor]:
    """One checkpoint in ``save``; returns its tensors."""
    vocabulary = resolved.get("padded_vocab_size", VOCABULARY)
    tensors = random_tensors(model, vocabulary) if tensors is None else tensors
    folder = save / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    with without_process_group():
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    torch.save({}, folder / "common.pt")
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {"sharded_backend_version": 1, "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends | versions))
    record = cli.to_dict(RunConfig(model=model, data=data or DataConfig()))
    known = {"padded_vocab_size": vocabulary, "tokenizer_vocab_size": None, "iteration": iteration, "eod_id": None}
    record["resolved"] = known | {"consumed_samples": 10, "consumed_tokens": 320} | resolved
    (folder / "run_config.json").write_text(json.dumps(record, default=str))
    (save / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return tensors
