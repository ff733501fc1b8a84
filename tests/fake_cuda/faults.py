"""Faults that only a GPU shows, to be planted into a run: ``test_fake_cuda.py`` must see each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from mesh_megatron.model.mesh_model import MeshLanguageModule
from mesh_megatron.platform import device
from mesh_megatron.training import pretrain, step

EMBED, BUILD, FORWARD = MeshLanguageModule.embed, pretrain.build_model, step._forward_step


def _leave_buffer_behind(*args: Any) -> Any:
    model = BUILD(*args)
    model.modules[0].register_buffer("forgotten", torch.zeros(3))
    return model


def _add_on_cpu(self: Any, *inputs: Any) -> torch.Tensor:
    return EMBED(self, *inputs) + torch.zeros(self.model.hidden_size)


def _on_cpu(numbers: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype)


def _look_at_every_loss(*args: Any) -> Any:
    output, loss = FORWARD(*args)
    output.detach().sum().item()
    return output, loss


PLANTS = {
    "a buffer left on the CPU": (pretrain, "build_model", _leave_buffer_behind),
    "a CPU tensor among those of the GPU": (MeshLanguageModule, "embed", _add_on_cpu),
    "a collective of a CPU tensor": (device, "on_device", _on_cpu),
    "a read of every micro-batch": (step, "_forward_step", _look_at_every_loss),
}


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Have the trainer make one of PLANTS, if ``name`` is one."""
    if name is None:
        yield
        return
    with mock.patch.object(*PLANTS[name]):
        yield
