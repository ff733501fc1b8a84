"""Where Transformer Engine's FP8 begins and ends around a recursion.

A core that runs K times has K ranges of activations in one module. Recipes that scale each tensor or block by itself
never see that; Megatron-Core enters their context layer by layer. Delayed scaling keeps a history of largest values,
and Transformer Engine ends an entry of it, and sets new scales, whenever an *outermost* context ends. A context for
each run of the core, which is what Megatron-Core's blocks would do, would make every loop an entry of its own: one loop
scaled by the range of the one before, and the last loop standing for all. So one context goes around the whole forward
pass: its entry is the largest value over all loops, and all loops share one scale.

The backward pass ends its entry where the first module of the forward pass runs backwards. Every context, an inner one
too, makes the module after it such a first one, so that mark is taken away after each segment but the first.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from megatron.core.fp8_utils import HAVE_TE, get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig


def forward_fp8_context(config: TransformerConfig) -> AbstractContextManager:
    """The context of a whole forward pass, inside which those of blocks change nothing."""
    return get_fp8_context(config) if config.fp8 and config.fp8_recipe == "delayed" else nullcontext()


def after_segment(config: TransformerConfig) -> None:
    """Whatever runs next is not the first module of the pass, although the segment's own context says so."""
    if HAVE_TE and config.fp8 and config.fp8_recipe == "delayed":  # without it, contexts do nothing
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.is_first_fp8_module()  # asking takes the mark away


def bf16_segment_context(config: TransformerConfig) -> AbstractContextManager:
    """The context of a segment that stays in bfloat16, for ``config`` of the whole model."""
    if not config.fp8 or config.fp8_recipe != "delayed":
        return nullcontext()  # nothing goes around it that it would have to leave
    from transformer_engine.pytorch import fp8_autocast

    return fp8_autocast(enabled=False)
