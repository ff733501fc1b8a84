"""Make a plain pretrained model recursive: map its layers to prelude, core and coda; initialise the recurrence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch

from mesh_megatron.config.layout import Layout
from mesh_megatron.config.model import ModelConfig, Recurrence

CoreInit = Literal["first", "average", "select"]
# Share of a router's softmax on the slot that makes a cycle the base recursion; the other slots still get gradients.
_FAVOURED = 0.99


def recursive_config(
    plain: ModelConfig, layout: str, recurrence: Recurrence, num_memory_slots: int | None = None
) -> ModelConfig:
    """Return ``plain`` with ``layout`` and ``recurrence``; ``ValueError`` if it is already recursive."""
    if plain.segments.shared and plain.segments.loops > 1:
        raise ValueError(f"--layout {layout}: the model to import is already recursive ({plain.layout})")
    if plain.scheme != "base":
        raise ValueError(f"--layout {layout}: the model to import already passes state ({plain.recurrence})")
    target = replace(plain, layout=layout, recurrence=recurrence, num_memory_slots=num_memory_slots, router_init="base")
    target.validate()
    loops = target.segments.loops
    if target.scheme == "mesh" and target.memory_slots < loops + 2:
        raise ValueError(
            f"--num-memory-slots {target.memory_slots}: starting near the base recursion takes a slot for the "
            f"embedding and one for each of {loops + 1} cycles: use at least {loops + 2}"
        )
    return target


def layer_sources(depth: int, layout: Layout, init: CoreInit) -> dict[tuple[str, int], list[int]]:
    """Map (segment, index) of each new layer to the layers of a plain model of ``depth`` whose mean it is.

    Prelude and coda are the plain model's ends. Of the n layers between them the shared core of C layers takes the
    ``first`` C, C spread evenly from the first to the last (``select``), or the mean of each C-th (``average``).
    Unshared loops take all n as they are.
    """
    middle = list(range(layout.prelude, depth - layout.coda))
    cores = _core_sources(middle, depth, layout, init)
    sources = {("prelude", i): [i] for i in range(layout.prelude)}
    sources |= {("core", i): layers for i, layers in enumerate(cores)}
    return sources | {("coda", i): [depth - layout.coda + i] for i in range(layout.coda)}


def _core_sources(middle: list[int], depth: int, layout: Layout, init: CoreInit) -> list[list[int]]:
    n, core = len(middle), layout.core
    between = f"--layout {layout} leaves {n or 'nothing'} between prelude and coda of a model of {depth} layers"
    if not layout.shared:
        if n != layout.unique_core_layers:
            raise ValueError(f"{between}; its unshared loops need exactly {layout.unique_core_layers}")
        return [[layer] for layer in middle]
    if n < core:
        raise ValueError(f"{between}; its core needs at least {core}")
    if init == "first":
        return [[layer] for layer in middle[:core]]
    if init == "select":
        step = (n - 1) / (core - 1) if core > 1 else 0.0
        return [[middle[round(i * step)]] for i in range(core)]
    if n % core:
        raise ValueError(f"{between}; --init average needs a multiple of {core}: use --init first or select")
    return [middle[i::core] for i in range(core)]


def initial_recurrence(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Initialise a recurrence tensor (checkpoint key ``name``) at the base recursion, or for mesh near it.

    Weights are zero; a mesh router's biases put 99% of each softmax on slot c+1 of cycle c.
    """
    if name in ("recurrence.coefficients", "recurrence.router.bias"):
        return torch.tensor([1.0, 0.0, 0.0])
    tensor = torch.zeros(shape)
    if name.endswith(".bias"):
        cycle, slots = int(name.split(".")[-2]), shape[0] // 2
        tensor.view(2, slots)[:, cycle + 1] = math.log(_FAVOURED / (1 - _FAVOURED) * (slots - 1))
    return tensor
