"""Export a training checkpoint to a Hugging Face folder, with one shard of tensors in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig

from mesh_megatron.checkpoint.reader import CheckpointReader
from mesh_megatron.hf.convert import StateDictAdapter, check_tensors, reason_not_native, to_hf_config
from mesh_megatron.hf.model_card import LOSS_FIGURE, model_card
from mesh_megatron.util.atomic_files import open_to_others

MODEL_CODE = ("configuration_mesh.py", "modeling_mesh.py")


@dataclass(frozen=True)
class Exporter:
    """Writes the files of an exported model; ``dtype`` None keeps the checkpoint's dtypes."""

    reader: CheckpointReader
    dtype: torch.dtype | None = None
    shard_bytes: int = 5 * 10**9

    def __post_init__(self) -> None:
        check_tensors(self.adapter.shapes, self.reader.shapes, f"--load {self.reader.folder}")

    @cached_property
    def adapter(self) -> StateDictAdapter:
        model = self.reader.config.model
        return StateDictAdapter(model, self.reader.resolved["padded_vocab_size"], reason_not_native(model) is None)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The exported model's configuration."""
        adapter = self.adapter
        config = to_hf_config(adapter.model, adapter.vocabulary, self.reader.resolved.get("eod_id"), adapter.native)
        config.dtype = self.dtype or self.reader.dtype("embedding.word_embeddings.weight")
        return config

    def write(self, folder: Path, licence: str = "other") -> None:
        """Write everything except tokenizer and figure: weights, configurations, model code and model card."""
        self.write_weights(folder)
        self.config.save_pretrained(folder)
        self.generation_config().save_pretrained(folder)
        if not self.adapter.native:
            for name in MODEL_CODE:
                shutil.copyfile(Path(__file__).with_name(name), folder / name)
        card = model_card(self.reader, self.adapter, self.config, licence, (folder / LOSS_FIGURE).is_file())
        (folder / "README.md").write_text(card, encoding="utf-8")

    def write_weights(self, folder: Path) -> None:
        """Write safetensors files of at most ``shard_bytes`` (a larger tensor gets its own file) and their index."""
        shards = list(self.shards())
        weight_map: dict[str, str] = {}
        for number, keys in enumerate(tqdm(shards, desc="exporting", unit="shard", disable=len(shards) == 1), start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = dict(self.convert(keys))
            save_file(tensors, folder / name, metadata={"format": "pt"})
            open_to_others(folder / name)  # safetensors makes it from a temporary file of mode 600
            weight_map |= dict.fromkeys(tensors, name)
        if len(shards) > 1:
            total = sum(self.size(key) for keys in shards for key in keys)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def convert(self, keys: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the exported (name, tensor) of each checkpoint key."""
        adapter = self.adapter
        for key, tensor in self.reader.read(keys).items():
            name, tensor = adapter.to_hf(key, tensor, self.dtype)
            yield name, tensor.contiguous()

    def shards(self) -> Iterator[list[str]]:
        """Yield the checkpoint keys of each file, in the order of computation."""
        shard: list[str] = []
        used = 0
        for key in self.adapter.names:
            size = self.size(key)
            if shard and used + size > self.shard_bytes:
                yield shard
                shard, used = [], 0
            shard.append(key)
            used += size
        yield shard

    def size(self, key: str) -> int:
        """Return the size of an exported tensor in bytes."""
        stored = self.reader.dtype(key)
        dtype = stored if self.dtype is None or key.startswith("recurrence.") else self.dtype
        return math.prod(self.reader.shapes[key]) * dtype.itemsize

    def generation_config(self) -> GenerationConfig:
        """Return settings that stop at the end of document and never sample ids that only pad the embedding."""
        resolved = self.reader.resolved
        eod, known = resolved.get("eod_id"), resolved.get("tokenizer_vocab_size")
        options: dict[str, Any] = {
            "bos_token_id": eod,
            "eos_token_id": eod,
            "pad_token_id": self.config.pad_token_id,
        }
        if known is not None and known < self.adapter.vocabulary:
            options["suppress_tokens"] = list(range(known, self.adapter.vocabulary))
        return GenerationConfig(**options)
