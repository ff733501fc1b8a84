"""Tiny models with weights large enough that every part of them shows in the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mesh_megatron.hf.configuration_mesh import MeshConfig
from mesh_megatron.hf.modeling_mesh import MeshForCausalLM

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


@pytest.fixture
def make_model() -> Callable[..., MeshForCausalLM]:
    def make(**changes: Any) -> MeshForCausalLM:
        model = MeshForCausalLM(make_config(**changes)).eval()
        randomize(model)
        return model

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Three sequences of 12 tokens."""
    return torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def left_padding() -> torch.Tensor:
    """An attention mask for ``ids``: rows of 12, 9 and 5 tokens, padded on the left."""
    return (torch.arange(12) >= torch.tensor([[0], [3], [7]])).long()
