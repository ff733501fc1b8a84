"""Text of generated tokens as they arrive, with the spaces that it has as a complete text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Last character of tokens that end inside a character."""


class TextStream(BaseStreamer):
    """Gives the text of a continuation to ``write``, piece by piece.

    What a token reads as depends on the tokens before it: SentencePiece drops the space before the first one. So each
    piece is the difference between the text of some last tokens with and without the new ones. (``TextStreamer`` of
    transformers decodes every line and the continuation by itself: Python loses a space of each indentation.)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], Any], show_prompt: bool):
        self.tokenizer, self.write, self.show_prompt = tokenizer, write, show_prompt
        self.ids: list[int] = []
        self.start = self.shown = 0
        """The tokens from ``start`` to ``shown`` are on the screen, and are decoded with the next ones."""

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, S] in the first call, then each new token [1]."""
        is_prompt = not self.ids
        self.ids += value.flatten().tolist()
        if is_prompt:
            self.shown = len(self.ids)
            if self.show_prompt:
                self.write(self.text(0, self.shown))
        else:
            self.show(complete=False)

    def end(self) -> None:
        """Write what is left, and end the line."""
        self.show(complete=True)
        self.write("\n")

    def show(self, complete: bool) -> None:
        text = self.text(self.start, len(self.ids))
        if complete or not text.endswith(_INCOMPLETE):
            self.write(text[len(self.text(self.start, self.shown)) :])
            self.start, self.shown = self.shown, len(self.ids)

    def text(self, first: int, last: int) -> str:
        ids = self.ids[first:last]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
