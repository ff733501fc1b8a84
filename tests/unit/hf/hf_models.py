"""Tiny models with weights large enough that every part of them shows in the logits."""

from __future__ import annotations

from typing import Any

import torch

from mesh_megatron.hf.configuration_mesh import MeshConfig

VOCABULARY = 101


def make_config(**changes: Any) -> MeshConfig:
    tiny = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_prelude_layers": 1,
        "num_core_layers": 2,
        "num_loops": 2,
        "num_coda_layers": 1,
        "max_position_embeddings": 64,
        "rotary_percent": 0.5,
    }
    return MeshConfig(**{**tiny, **changes})


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Norms around one, all else around zero, biases and routers included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.1 + ("norm" in name and name.endswith("weight")))
