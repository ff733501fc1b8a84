"""Make a plain pretrained model recursive: map its layers to prelude, core and coda; initialise the recurrence."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

import torch

from mesh_megatron.config.exits import EXIT_GATE
from mesh_megatron.config.layout import Layout
from mesh_megatron.config.model import ModelConfig, Recurrence
from mesh_megatron.config.recurrence import scheme_spec
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.util.constant_tensor import constant_tensor
from mesh_megatron.util.normal_tensor import normal_tensor

CoreInit = Literal["first", "average", "select"]
DIFFERENCE = re.compile(r"\.loop_(down|up)$")
"""End of the checkpoint key of a low-rank difference of loops."""


def recursive_config(plain: ModelConfig, layout: str, recurrence: Recurrence, **settings: Any) -> ModelConfig:
    """Return ``plain`` with ``layout``, ``recurrence`` and the scheme's ``settings``.

    Raises ``ValueError`` if it is already recursive.
    """
    if plain.segments.shared and plain.segments.loops > 1:
        raise ValueError(f"--layout {layout}: the model to import is already recursive ({plain.layout}): drop --layout")
    if plain.scheme != "base":
        raise ValueError(
            f"--layout {layout}: the model to import already passes state ({plain.recurrence}): drop --layout"
        )
    target = replace(plain, layout=layout, recurrence=recurrence, router_init="base", **settings)
    target.validate()
    scheme_spec(target).check_base_start()
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


def difference_at_base(key: str, shape: tuple[int, ...], model: ModelConfig) -> torch.Tensor:
    """Initialise a half of a low-rank difference of loops, so that the difference is zero and A random."""
    if key.endswith("_up"):
        return torch.zeros(shape)
    return normal_tensor(TrainingConfig().seed, key, shape, model.init_method_std)


def start_at_base(key: str, model: ModelConfig) -> torch.Tensor:
    """Initialise a recurrence tensor (checkpoint key ``key``) at the base recursion, or as near it as it can.

    The exit gate, which changes no state, starts as in training from scratch.
    """
    parameter = scheme_spec(model).all_parameters()[key.removeprefix("recurrence.")]
    if key.startswith(EXIT_GATE) and parameter.start == "normal":
        return normal_tensor(TrainingConfig().seed, key, parameter.shape, model.init_method_std)
    return constant_tensor(parameter.at_base, parameter.shape)
