"""Models and token ids that several files use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_models import VOCABULARY, make_config, randomize

from mesh_megatron.hf.modeling_mesh import MeshForCausalLM


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
