"""Initial weights as a function of the seed and a parameter's checkpoint name, equal under any layout of ranks."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.recurrence import scheme_spec
from mesh_megatron.util.constant_tensor import constant_tensor
from mesh_megatron.util.cores import cores
from mesh_megatron.util.normal_tensor import normal_tensor


def initialize_weights(module: Any, config: ModelConfig, seed: int) -> None:
    """Initialise every parameter of ``module`` (a model, or one rank's part of it).

    ====================================================  =====================================================
    parameter                                             value (Appendix B; std is ``--init-method-std``)
    ====================================================  =====================================================
    embedding                                             N(0, ``--embedding-init-method-std``), default std
    output layer, linear_qkv, linear_fc1                  N(0, std)
    low-rank differences of loops (core)                  A: N(0, std), B: 0 (``--loop-lora-rank``)
    linear_proj, linear_fc2 (into the residual stream)    N(0, std / sqrt(2 N_compute)), the *computed* depth
    norm weights                                          1
    biases                                                0
    experts (core.layers.i.mlp.experts.experts)           as linear_fc1 and linear_fc2, drawn separately
    routers (experts)                                     N(0, std)
    routers (mesh, dynamic)                               N(0, ``--router-init-std``), default std
    router biases, ``--router-init uniform``              0: every slot has write and read weight 1/M
    router biases, other ``--router-init``                ``--router-bias`` on favoured slots (``MeshSpec``)
    router scales                                         ``--router-scale``
    static coefficients, dynamic biases                   (1, 0, 0): the base recursion
    ====================================================  =====================================================

    The rows of recurrence schemes are in ``config/recurrence.py``.

    Every complete tensor is drawn on the CPU in float32, from a generator seeded by its name, and cut to the part that
    this rank holds. A few threads draw different tensors, because a generator uses only one core.
    """
    wanted: dict[tuple[str, tuple[int, ...]], list[tuple[Tensor, Any]]] = defaultdict(list)
    for entry in nested_values(module.sharded_state_dict()):
        shards = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
        for shard in shards:
            if isinstance(shard, ShardedTensor):
                name, shape, part = shard.key, shard.global_shape, place_in_complete(shard)
                if shard.prepend_axis_num:  # one of several experts: drawn separately, under its own name
                    name, shape, part = f"expert {part[0]} of {name}", shape[1:], part[1:]
                wanted[name, shape].append((shard.data, part))

    @torch.no_grad()
    def fill(name: str, shape: tuple[int, ...]) -> None:
        complete = initial_value(name, shape, config, seed)
        for target, part in wanted[name, shape]:
            target.copy_(complete[part])

    with ThreadPoolExecutor(_threads()) as pool:
        for _ in pool.map(lambda key: fill(*key), wanted):
            pass


def place_in_complete(shard: ShardedTensor) -> tuple[int | slice, ...]:
    """Return the index of the complete tensor that selects ``shard``."""
    stacked, offsets = shard.global_offset[: shard.prepend_axis_num], shard.global_offset[shard.prepend_axis_num :]
    return *stacked, *(slice(start, start + size) for start, size in zip(offsets, shard.local_shape, strict=True))


def _threads() -> int:
    """Return a number of threads: at most 8, and at most this rank's share of the cores."""
    return min(8, max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """Draw the complete initial tensor of the parameter that checkpoints call ``name``."""
    std = config.init_method_std
    if name.startswith("recurrence."):
        parameter = scheme_spec(config).all_parameters()[name.removeprefix("recurrence.")]
        if parameter.start != "normal":
            return constant_tensor(parameter.start, shape)
        std = std if parameter.std is None else parameter.std
    if name.endswith(("bias", ".loop_up")):
        return torch.zeros(shape)
    if name.endswith(("norm_weight", "norm.weight")):
        return torch.ones(shape)
    if name == "embedding.word_embeddings.weight" and config.embedding_init_method_std is not None:
        std = config.embedding_init_method_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * config.segments.computed_layers)
    return normal_tensor(seed, name, shape, std)
