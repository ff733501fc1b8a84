"""Transformer Engine's linear layers, made for modules that run several times in a micro-batch."""

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
