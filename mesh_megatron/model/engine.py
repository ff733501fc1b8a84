"""Transformer Engine's linear layers as this model needs them."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def repeatable(linear: type) -> type:
    """``linear``, Megatron-Core's layer of Transformer Engine, whose products always add to the gradient buffer.

    Told that a micro-batch is the first, Transformer Engine quantises the weight and has the weight's gradient
    *overwrite* the buffer. Megatron-Core says so for the first call of a module. The first loop of a core is that call
    and has the last of the backward passes: its gradient would wipe out what all other loops have added.
    """

    class Repeatable(linear):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self.is_first_microbatch:  # type: ignore[has-type]
                self._fp8_workspaces.clear()  # quantised anew, once: other loops and micro-batches find it there
                self.is_first_microbatch = False
            return super().forward(*args, **kwargs)

    Repeatable.__name__ = Repeatable.__qualname__ = linear.__name__
    return Repeatable


@functools.cache
def adds_its_bias(linear: type) -> type:
    """``linear`` with its bias added by the product; Megatron-Core's feed-forward layer asks to add it afterwards.

    It fuses that with GELU's approximation, which this model does not use, and alone it is a pass over the widest
    tensor of a layer each way.
    """

    class AddsItsBias(linear):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, skip_bias_add: bool, **kwargs: Any) -> None:
            super().__init__(*args, skip_bias_add=False, **kwargs)

    AddsItsBias.__name__ = AddsItsBias.__qualname__ = linear.__name__
    return AddsItsBias


@functools.cache
def returns_its_summand(linear: type) -> type:
    """``linear``, row-parallel, that returns this rank's summand; whoever calls it sums over ranks."""

    class ReturnsItsSummand(linear):  # type: ignore[misc,valid-type]
        returns_summand = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)  # which has cut the weight for this rank
            self.parallel_mode = None
            self.sequence_parallel = False

    ReturnsItsSummand.__name__ = ReturnsItsSummand.__qualname__ = linear.__name__
    return ReturnsItsSummand
