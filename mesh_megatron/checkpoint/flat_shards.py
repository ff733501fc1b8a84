"""Express a flat slice of a parameter as boxes (rectangular shards) of its tensor in a checkpoint.

The distributed optimizer cuts parameters where its ranks' shares of a bucket end, in the middle of rows. A distributed
checkpoint stores boxes: offset and size along each axis. A flat slice of a matrix is at most three boxes: the end of a
row, complete rows, and the beginning of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory
from torch import Tensor

Sizes = tuple[int, ...]


def boxes(shape: Sizes, start: int, stop: int) -> Iterator[tuple[Sizes, Sizes]]:
    """Yield (offset, size) of the boxes that cover elements ``start`` to ``stop`` of a row-major tensor, in order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    width = prod(shape[1:])

    def within(row: int, first: int, last: int) -> Iterator[tuple[Sizes, Sizes]]:
        for offset, size in boxes(shape[1:], first, last):
            yield (row, *offset), (1, *size)

    top, bottom = -(-start // width), stop // width  # complete rows, if top is below bottom
    if top > bottom:
        yield from within(bottom, start - bottom * width, stop - bottom * width)
        return
    yield from within(top - 1, start - (top - 1) * width, width if start < top * width else 0)
    if top < bottom:
        yield (top, *(0 for _ in shape[1:])), (bottom - top, *shape[1:])
    yield from within(bottom, 0, stop - bottom * width)


def of_weight(entry: ShardedBase, prefix: str, tensor: Tensor, alone: bool = False) -> ShardedBase:
    """Describe ``tensor`` with the sharding of ``entry``, under the checkpoint key ``prefix`` + ``entry.key``.

    ``alone`` if no other data-parallel rank holds it.
    """
    key = prefix + entry.key
    replica = (*entry.replica_id[:-1], 0) if alone else entry.replica_id
    if isinstance(entry, ShardedTensor):
        return replace(entry, key=key, data=tensor, dtype=tensor.dtype, replica_id=replica)
    return replace(entry, key=key, data=tensor, replica_id=replica)


def shards_of_slice(entry: ShardedBase, prefix: str, flat: Tensor, span: slice) -> list[ShardedTensor]:
    """Shard ``flat``, the elements ``span`` of the parameter that ``entry`` describes, under keys as in ``of_weight``.

    The shards' data are views of ``flat``, in its order. Only this data-parallel rank holds them (replica 0), unless
    the parameter is marked as a ``copy_of_share`` (``parallel/fully_sharded.py``).
    """
    found, taken, copy = [], 0, getattr(entry.data, "copy_of_share", 0)
    for shard, first in _shards(entry):
        ahead, shape = shard.prepend_axis_num, shard.local_shape
        start, stop = max(span.start - first, 0), min(span.stop - first, prod(shape))
        for offset, size in boxes(shape, start, stop):
            data = flat[taken : taken + prod(size)].view((1,) * ahead + size)
            taken += prod(size)
            place = zip(shard.global_offset, (0,) * ahead + offset, strict=True)
            found.append(
                replace(
                    shard,
                    key=prefix + shard.key,
                    data=data,
                    dtype=data.dtype,
                    local_shape=tuple(data.shape),
                    global_offset=tuple(base + here for base, here in place),
                    axis_fragmentations=None,
                    prepend_axis_num=0,
                    replica_id=(*shard.replica_id[:-1], copy),
                )
            )
    return found


def _shards(entry: Any) -> list[tuple[ShardedTensor, int]]:
    """List the checkpoint tensors that store a parameter, each with the flat index of its first element."""
    if isinstance(entry, ShardedTensor):
        return [(entry, 0)]
    assert isinstance(entry, ShardedTensorFactory)
    built = replace(entry, data=torch.empty(entry.data.shape, device="meta")).build()
    shards = list(built.values()) if isinstance(built, dict) else list(built)
    assert all(shard.data.is_contiguous() for shard in shards), f"{entry.key} is not cut along its first axis"
    return [(shard, shard.data.storage_offset()) for shard in shards]
