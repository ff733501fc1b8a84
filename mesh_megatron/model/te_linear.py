"""Transformer Engine's linear layers as this model needs them: Megatron-Core's classes with habits of ours."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def with_mixins(linear: type, *mixins: type) -> type:
    """``linear`` with ``mixins``, classes of this file; the same class whenever it is asked for."""
    return type(linear.__name__, (*mixins, linear), {})


class AddsUpLoops:
    """Products always add to the gradient buffer.

    Told that a micro-batch is the first, Transformer Engine quantises the weight and has the weight's gradient
    *overwrite* the buffer. Megatron-Core says so for the first call of a module. The first loop of a core is that call
    and has the last of the backward passes: its gradient would wipe out what all other loops have added.
    """

    is_first_microbatch: bool
    _fp8_workspaces: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_first_microbatch:
            self._fp8_workspaces.clear()  # quantised anew, once: other loops and micro-batches find it there
            self.is_first_microbatch = False
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class AddsItsBias:
    """The product adds the bias; Megatron-Core's feed-forward layer asks to add it afterwards.

    It fuses that with GELU's approximation, which this model does not use, and alone it is a pass over the widest
    tensor of a layer each way.
    """

    def __init__(self, *args: Any, skip_bias_add: bool, **kwargs: Any) -> None:
        super().__init__(*args, skip_bias_add=False, **kwargs)  # type: ignore[call-arg]


class ReturnsItsSummand:
    """A row-parallel layer returns this rank's summand; whoever calls it sums over ranks."""

    returns_summand = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # which has cut the weight for this rank
        self.parallel_mode = None
        self.sequence_parallel = False
