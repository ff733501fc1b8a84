"""FP8 contexts of Transformer Engine around a recursive model.

A core that runs K times has K ranges of activations in one module. Recipes that scale each tensor or block separately
are not affected; Megatron-Core enters their context layer by layer. Delayed scaling keeps a history of largest values
(amax). Transformer Engine adds an entry and updates the scales whenever an *outermost* context ends. With one context
per run of the core, as Megatron-Core's blocks have it, every loop would add an entry: each loop would be scaled by the
range of the previous one, and the last loop would determine the scale of the next step. So one context encloses the
complete forward pass: its entry is the largest value over all loops, and all loops share one scale.

In the backward pass, Transformer Engine adds the entry when the first module of the forward pass runs backwards. Every
context, also a nested one, marks the next module as the first one. ``after_segment`` removes this mark, so that only
the first module of the forward pass has it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from megatron.core.fp8_utils import HAVE_TE, get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig


def forward_fp8_context(config: TransformerConfig) -> AbstractContextManager:
    """Return the FP8 context of a complete forward pass, in which the contexts of blocks have no effect."""
    return get_fp8_context(config) if config.fp8 and config.fp8_recipe == "delayed" else nullcontext()


def after_segment(config: TransformerConfig) -> None:
    """Remove the mark of a segment's context that the next module is the first one of the forward pass."""
    if HAVE_TE and config.fp8 and config.fp8_recipe == "delayed":  # without Transformer Engine, contexts do nothing
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.is_first_fp8_module()  # reading the mark removes it


def bf16_segment_context(config: TransformerConfig) -> AbstractContextManager:
    """Return the context of a segment that stays in bfloat16; ``config`` is that of the complete model."""
    if not config.fp8 or config.fp8_recipe != "delayed":
        return nullcontext()  # there is no enclosing FP8 context to leave
    from transformer_engine.pytorch import fp8_autocast

    return fp8_autocast(enabled=False)
