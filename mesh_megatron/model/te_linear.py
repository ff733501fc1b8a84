"""Mixins that adapt Megatron-Core's Transformer Engine linear layers to a recursive model."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def with_mixins(linear: type, *mixins: type) -> type:
    """Return a subclass of ``linear`` with ``mixins`` of this file; cached, so equal arguments give the same class."""
    return type(linear.__name__, (*mixins, linear), {})


class AddsUpLoops:
    """Mixin: weight gradients are always added to the gradient buffer.

    For the first micro-batch, Transformer Engine quantises the weight and lets the weight's gradient *overwrite* the
    buffer. Megatron-Core marks the first call of a module as the first micro-batch. In a recursive model that call is
    the first loop, whose backward pass is the last: its gradient would erase the gradients of all other loops.
    """

    is_first_microbatch: bool
    _fp8_workspaces: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_first_microbatch:
            self._fp8_workspaces.clear()  # quantise the weight again, once for all loops and micro-batches
            self.is_first_microbatch = False
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class AddsItsBias:
    """Mixin: the matrix product adds the bias, although Megatron-Core's feed-forward layer asks to add it itself.

    Megatron-Core fuses the bias with GELU's tanh approximation, which this model does not use. Added separately, it
    costs one more pass over the widest tensor of a layer, forward and backward.
    """

    def __init__(self, *args: Any, skip_bias_add: bool, **kwargs: Any) -> None:
        super().__init__(*args, skip_bias_add=False, **kwargs)  # type: ignore[call-arg]


class ReturnsItsSummand:
    """Mixin: a row-parallel layer returns this rank's partial sum; the caller reduces it over ranks."""

    returns_summand = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # cuts the weight for this rank, so tensor parallelism must still be set
        self.parallel_mode = None
        self.sequence_parallel = False
