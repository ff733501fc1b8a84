"""Segments (prelude, core, coda): runs of layers whose checkpoint names do not depend on the layout of ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from mesh_megatron.model.dropout import Masks
from mesh_megatron.model.fp8 import after_segment, bf16_segment_context
from mesh_megatron.model.layer import LayerPass
from mesh_megatron.model.loop_keys import LoopKeys
from mesh_megatron.model.transformer_config import MeshTransformerConfig


class Segment(TransformerBlock):
    """Layers ``indices`` of the segment ``name``, as one Megatron-Core block.

    Its configuration describes a model of the segment's own depth without a pipeline, so that Megatron-Core's
    recomputation, FP8 contexts and sharded state work unchanged. Checkpoint names are ``{name}.layers.{index}.``,
    whichever layers of the segment are held here.
    """

    def __init__(self, config: MeshTransformerConfig, spec: ModuleSpec, name: str, indices: range) -> None:
        self.whole_config = config
        self.in_bf16 = config.fp8_core_only and name != "core"
        config = copy.copy(config)
        config.fp8 = None if self.in_bf16 else config.fp8
        config.num_layers = max(len(indices), 1)
        config.pipeline_model_parallel_size = 1
        config.virtual_pipeline_model_parallel_size = None
        layers = TransformerBlockSubmodules(layer_specs=[spec] * len(indices), layer_norm=None)
        super().__init__(config, layers, post_layer_norm=False, pre_process=True, post_process=False)
        self.name = name
        self.indices = indices

    def forward(
        self, *args: Any, masks: Masks | None = None, loop: int = 0, keys: LoopKeys | None = None, **kwargs: Any
    ) -> Tensor:
        """Run the block; with ``fp8_core_only``, prelude and coda run in bfloat16 inside an FP8 pass too.

        ``masks`` are those of the segment's layer 0, for dropout; ``loop`` is the loop that runs, ``keys``
        those of the first one, if loops share them.
        """
        if masks is not None or keys is not None or self.whole_config.loops_with_parameters:
            mine = None if masks is None else masks.after(self.indices.start)
            kwargs["attention_bias"] = LayerPass(mine, loop, keys)
        if self.in_bf16:
            with bf16_segment_context(self.whole_config):
                return super().forward(*args, **kwargs)
        output = super().forward(*args, **kwargs)
        if len(self.layers) > 0:
            after_segment(self.whole_config)
        return output

    def _get_layer(self, layer_number: int) -> Any:
        """Return a layer; Megatron-Core asks beyond the end if the last group of recomputed layers is incomplete."""
        return self.layers[layer_number] if layer_number < len(self.layers) else _PastTheEnd()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for position, index in enumerate(self.indices):
            here = f"{prefix}layers.{position}."
            module: Any = self.layers[position]
            layer = module.sharded_state_dict(here, sharded_offsets, metadata)
            replace_prefix_for_sharding(layer, here, f"{self.name}.layers.{index}.")
            state.update(layer)
        return state


class _PastTheEnd:
    """Identity in place of layers beyond the end of a segment."""

    layer_number = 1  # Megatron-Core reads it if layers are in FP8

    def __call__(self, *, hidden_states: Tensor, context: Any, **_: Any) -> tuple[Tensor, Any]:
        return hidden_states, context


class CoreLoops(torch.nn.ModuleList):
    """The core of all loops: one shared segment, or one segment per loop."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        state: dict[str, Any] = {}
        segment: Any
        for position, segment in enumerate(self):
            state.update(segment.sharded_state_dict(f"{prefix}{position}.", sharded_offsets, metadata))
        return state
