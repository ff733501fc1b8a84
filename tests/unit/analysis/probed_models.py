"""Small models with weights large enough that every part of them shows in the states."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from mesh_megatron.hf.configuration_mesh import SCHEMES, MeshConfig
from mesh_megatron.hf.modeling_mesh import MeshForCausalLM

__all__ = ["SCHEMES", "VOCABULARY", "mesh_model", "plain_model", "sequence"]

VOCABULARY = 61
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64}


def mesh_model(**changes: Any) -> MeshForCausalLM:
    """1+1R2+1 unless ``changes`` say otherwise."""
    layout = {"num_prelude_layers": 1, "num_core_layers": 1, "num_loops": 2, "num_coda_layers": 1}
    return _randomize(MeshForCausalLM(MeshConfig(**{**_SIZES, **layout, **changes})).eval())


def plain_model(layers: int) -> GPTNeoXForCausalLM:
    return _randomize(
        GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES, intermediate_size=64, num_hidden_layers=layers)).eval()
    )


def sequence(length: int = 24) -> torch.Tensor:
    """Token ids [length]."""
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _randomize(model: Any) -> Any:
    """Norms around one, all else around zero, biases and routers included."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.2 + ("norm" in name and name.endswith("weight")))
    return model
