"""Linear layers of the core with a low-rank difference of each loop, W_t = W + B_t A_t (``--loop-lora-rank``).

Relaxed recursive transformers (Bae et al. 2024, arXiv:2410.20672), with B_t = 0 at first, so that all loops begin as W.
The differences of all loops are one pair of tensors per linear layer; loops beyond K take the last one's. W_t itself
is never built: A_t x has R channels, so that B_t A_t x costs little beside W x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mesh_megatron.model.shared_projection import Affine, SharedProjection
from mesh_megatron.model.transformer_config import MeshTransformerConfig


class LowRank:
    """Mixin of a tensor-parallel linear layer: ``loop_down`` is A [K, R, inputs], ``loop_up`` is B [K, outputs, R].

    With two ``parts`` (of a gated layer) B is [K, 2, outputs / 2, R], because ranks split each part.
    """

    parts = 1
    loop = 0
    """The loop that runs; set by ``enter_loop``."""
    queries_alone = False
    of_queries: Callable[[Tensor], Tensor]
    """See ``loop_keys.py``."""
    config: MeshTransformerConfig
    tp_group: Any
    sequence_parallel: bool
    loop_down: nn.Parameter
    loop_up: nn.Parameter

    def add_factors(self, inputs: int, outputs: int, split: str, axis: int) -> None:
        """Add the parameters; ranks split the one named ``split`` along ``axis``, and all hold the other one."""
        config, self.split, self.axis = self.config, split, axis
        loops, rank = config.loops_with_parameters, config.loop_lora_rank
        rows = (outputs,) if self.parts == 1 else (self.parts, outputs // self.parts)
        for name, shape in {"loop_down": (loops, rank, inputs), "loop_up": (loops, *rows, rank)}.items():
            parameter: Any = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            if name == split:
                set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            else:  # each rank's gradient is of its tokens or columns: Megatron-Core sums them
                parameter.sequence_parallel = config.sequence_parallel
            setattr(self, name, parameter)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A [R, inputs] and B [outputs, R] of the loop that runs; where it computes queries alone, their rows of B."""
        loop = min(self.loop, len(self.loop_down) - 1)
        up = self.loop_up[loop].flatten(0, -2)
        return self.loop_down[loop], self.of_queries(up) if self.queries_alone else up

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        assert metadata is not None
        return entries | make_sharded_tensors_for_checkpoint(
            {self.split: getattr(self, self.split)},
            prefix,
            {self.split: self.axis},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class LowRankColumn(LowRank):
    """Mixin of a column-parallel layer: ranks split B, each of them computes all of A x."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        layer: Any = self
        axis = 1 if self.parts == 1 else 2
        self.add_factors(layer.input_size, layer.output_size_per_partition, "loop_up", axis)

    def forward(self, input_: Any, *args: Any, **named: Any) -> Any:
        """Return [S, B, columns of this rank] and None; for ``project_together`` see ``SharedProjection``.

        There A's rows stand below W's, so that one product gives W x and A x.
        """
        layer: Any = super()
        down, up = self.factors
        if isinstance(input_, Affine):
            return _stacked(layer.forward(input_), down, input_)
        if isinstance(self, SharedProjection) and self.sequence_parallel:
            output, low = input_.split([len(up), len(down)], dim=-1)
            return output + F.linear(low.contiguous(), up), None  # of the product only A x is kept
        output, bias = layer.forward(input_, *args, **named)
        low = F.linear(input_, down)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return output + F.linear(low, up), bias


class LowRankRow(LowRank):
    """Mixin of a row-parallel layer: ranks split A, and sum their parts of A x or of the output."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        layer: Any = self
        self.add_factors(layer.input_size_per_partition, layer.output_size, "loop_down", 2)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return [S, B, outputs], complete or this rank's summand, and the bias if the caller must add it."""
        layer: Any = super()
        output, bias = layer.forward(input_)
        down, up = self.factors
        low = F.linear(input_, down)
        if getattr(self, "returns_summand", False):
            if not self.sequence_parallel:  # where it is, Megatron-Core sums the gradients of B once per step
                up = copy_to_tensor_model_parallel_region(up, group=self.tp_group)
        elif self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return output + F.linear(low, up), bias


def _stacked(affine: Affine, down: Tensor, norm: Affine) -> Affine:
    """Return the affine map of norm and layer with that of norm and A below it."""
    shift = None if norm.shift is None else down @ norm.shift
    if shift is None and affine.shift is not None:  # of the layer alone
        shift = affine.shift.new_zeros(len(down))
    return Affine(
        torch.cat([affine.scale, down * norm.scale]),
        None if affine.shift is None or shift is None else torch.cat([affine.shift, shift]),
    )


@functools.cache
def with_low_rank(linear: type, mixin: type[LowRank], parts: int = 1) -> type:
    """Return a subclass of ``linear`` with ``mixin``; cached, so that equal arguments give the same class."""
    return type(linear.__name__, (mixin, linear), {"parts": parts})


def enter_loop(branch: nn.Module, loop: int) -> None:
    """Have the linear layers of a branch add the difference of ``loop`` from now on."""
    for linear in branch.children():
        if isinstance(linear, LowRank):
            linear.loop = loop
