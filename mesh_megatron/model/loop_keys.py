"""Keys and values of the core's first loop, to which later loops attend (``--share-kv-across-loops``).

Loop 1 is a layer like any other. Loops 2..K compute queries alone, with the rows of the first linear layer that give
them, and attend to what the same core layer computed in loop 1. So there is one pair of keys and values per core layer
and micro-batch, and one entry in a key-value cache.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor

from mesh_megatron.model.rotary import RotarySelfAttention
from mesh_megatron.model.shared_projection import Affine, SharedProjection, after_norm
from mesh_megatron.model.transformer_config import MeshTransformerConfig
from mesh_megatron.model.twins import collect, twin_of


class LoopKeys:
    """Keys and values of one micro-batch in its first loop, by layer number.

    They are kept as twins: a recomputed layer, and a chunk on a ring, has a backward pass of its own. In all of them
    the first loop's comes last, and adds what later loops have collected.
    """

    def __init__(self) -> None:
        self._twins: dict[int, list[Tensor]] = {}

    def keep(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep the key and value [S, B, G, d] of a layer in the first loop; return the query to go on with.

        A layer that is recomputed keeps its first twins, which hold the gradients of later loops.
        """
        if layer not in self._twins:
            self._twins[layer] = [twin_of(key), twin_of(value)]
        return collect(self._twins[layer], query, [key, value]) if torch.is_grad_enabled() else query

    def of_layer(self, layer: int) -> list[Tensor]:
        """Return the key and value [S, B, G, d] of a layer."""
        return self._twins[layer]


class QueriesAlone:
    """Mixin of the linear layer of queries, keys and values, which computes queries alone if told to.

    It does not add gradients to the optimizer's buffers by itself (gradient accumulation fusion): autograd adds those
    of some rows and of all.
    """

    queries_alone = False
    config: MeshTransformerConfig
    weight: Tensor
    bias: Tensor | None
    sequence_parallel: bool
    allreduce_dgrad: bool
    tp_group: Any

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.gradient_accumulation_fusion = False

    def forward(self, input_: Any, *args: Any, **named: Any) -> Any:
        """Return [S, B, columns of this rank] and None; for ``project_together`` see ``SharedProjection``."""
        layer: Any = super()
        finished = isinstance(self, SharedProjection) and self.sequence_parallel and not isinstance(input_, Affine)
        if finished or not self.queries_alone:
            return layer.forward(input_, *args, **named)
        weight = self.of_queries(self.weight)
        bias = None if self.bias is None else self.of_queries(self.bias)
        if isinstance(input_, Affine):
            return after_norm(Affine(weight, bias), input_)
        if self.tp_group.size() == 1:
            return F.linear(input_, weight, bias), None
        return linear_with_grad_accumulation_and_async_allreduce(
            input_,
            weight,
            bias,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=self.sequence_parallel,
            tp_group=self.tp_group,
        ), None

    def of_queries(self, rows: Tensor) -> Tensor:
        """Return the rows of queries: each key-value head has those of its query heads, then its key and value."""
        config = self.config
        heads = config.num_attention_heads // config.num_query_groups
        return rows.unflatten(0, (-1, heads + 2, config.kv_channels))[:, :heads].flatten(0, 2)


@functools.cache
def with_queries_alone(linear: type) -> type:
    """Return a subclass of ``linear`` with ``QueriesAlone``; cached, so that equal arguments give the same class."""
    return type(linear.__name__, (QueriesAlone, linear), {})


class SharingSelfAttention(RotarySelfAttention):
    """Self-attention of a core layer whose later loops attend to the keys and values of the first."""

    _keys: LoopKeys | None = None

    def enter_loop(self, keys: LoopKeys | None, loop: int) -> None:
        """Have the next call keep its keys and values (in loop 0) or attend to those kept; without ``keys`` neither."""
        self._keys, self.linear_qkv.queries_alone = keys, keys is not None and loop > 0

    def forward(self, *args: Any, **named: Any) -> Any:
        """Call Megatron-Core's forward, as ``enter_loop`` has said."""
        output = super().forward(*args, **named)
        self.enter_loop(None, 0)  # or the keys would outlive their micro-batch
        return output

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        """Return query [S, B, H, d], key and value [S, B, G, d]; query and key are already rotated."""
        if self._keys is not None and self.linear_qkv.queries_alone:
            query = self.linear_qkv(hidden_states)[0].unflatten(-1, (-1, self.hidden_size_per_attention_head))
            query = query if self.q_layernorm is None else self.q_layernorm(query)
            return self.rotate(query), *self._keys.of_layer(self.layer_number)
        query, key, value = super().get_query_key_value_tensors(hidden_states, *args, **named)
        if self._keys is not None:
            value = value.contiguous()  # a part of the projection would keep all of it
            query = self._keys.keep(self.layer_number, query, key, value)
        return query, key, value
