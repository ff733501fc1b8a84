"""Cost in loss and savings in memory of keeping only the last loop's keys and values.

Every token of a data set is predicted by cached decoding, one token at a time after a prompt, once with the whole cache
and once with kv_cache_loops="last". See docs/huggingface.md.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import DynamicCache


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Loss and memory of a recursive model's key-value cache, whole and cut to the last loop."""

    load: Path
    """A checkpoint or an export of a model with a shared core."""
    data_path: str
    """Prefix of a .bin/.idx pair."""
    prompt: int = 16
    """Tokens computed at once before decoding starts."""
    batch: int = 32
    """Sequences decoded at the same time, each of the model's longest length."""


def main() -> int:
    from mesh_megatron.config.cli import parse
    from mesh_megatron.data.indexed import read_indexed
    from mesh_megatron.data.tokenizers import from_config
    from mesh_megatron.hf.loading import load_model
    from mesh_megatron.platform import device

    args = parse(Arguments)
    loaded = load_model(args.load, None, None, device.device(), from_config)
    length = loaded.max_length
    tokens = torch.from_numpy(read_indexed(args.data_path).tokens[: args.batch * length].astype("int64"))
    ids = tokens.view(args.batch, length).to(loaded.model.device)
    results = {}
    for kept in ("all", "last"):
        loaded.model.config.kv_cache_loops = kept
        loss, cache = decode(loaded.model, ids, args.prompt)
        stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        results[kept] = {"loss": loss, "cache bytes a token": stored / ids.numel(), "entries": len(cache.layers)}
    saved = results["last"]["cache bytes a token"] / results["all"]["cache bytes a token"]
    added = results["last"]["loss"] - results["all"]["loss"]
    print(json.dumps(results | {"cache ratio": saved, "loss difference": added}, indent=1))
    return 0


@torch.no_grad()
def decode(model: torch.nn.Module, ids_BS: torch.Tensor, prompt: int) -> tuple[float, DynamicCache]:
    """Mean cross-entropy of the tokens after the prompt, and the cache at the end."""
    cache = DynamicCache(config=model.config)
    logits = [model(ids_BS[:, :prompt], past_key_values=cache).logits[:, -1]]
    for position in range(prompt, ids_BS.shape[1]):
        logits.append(model(ids_BS[:, position : position + 1], past_key_values=cache).logits[:, -1])
    return F.cross_entropy(torch.stack(logits[:-1], dim=1).flatten(0, 1), ids_BS[:, prompt:].flatten()).item(), cache


if __name__ == "__main__":
    sys.exit(main())
