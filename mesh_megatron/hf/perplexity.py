"""Perplexity over windows of a token stream, computed like the validation loss of training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """Cross-entropy in nats over ``tokens`` predicted tokens, which decode to ``words`` and ``bytes`` of text
    (None without a tokenizer)."""

    nats: float
    tokens: int
    words: int | None = None
    bytes: int | None = None

    def __add__(self, other: Perplexity) -> Perplexity:
        both = [(self.words, other.words), (self.bytes, other.bytes)]
        words, count = (None if a is None or b is None else a + b for a, b in both)
        return Perplexity(self.nats + other.nats, self.tokens + other.tokens, words, count)

    def to_dict(self) -> dict[str, float | int | None]:
        """Return loss per token, perplexities and bits per byte; None if the number of units is unknown or zero."""
        return {
            "loss": self._per(self.tokens),
            "perplexity": self._exp(self.tokens),
            "word_perplexity": self._exp(self.words),
            "byte_perplexity": self._exp(self.bytes),
            "bits_per_byte": None if not self.bytes else self.nats / math.log(2) / self.bytes,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
        }

    def _per(self, units: int | None) -> float | None:
        return self.nats / units if units else None

    def _exp(self, units: int | None) -> float | None:
        """Compute exp(nats / units), infinite if it overflows a float."""
        per_unit = self._per(units)
        return None if per_unit is None else math.inf if per_unit > 700 else math.exp(per_unit)


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first input, end of inputs, first scored input) of each window over ``length`` tokens.

    Input i predicts token i + 1, so all tokens but the first are scored, each once, with at least
    ``window - stride`` tokens before them where the stream has as many. ``stride == window`` cuts as training does.
    """
    scored, start = 0, 0
    while scored < length - 1:
        end = min(start + window, length - 1)
        yield start, end, scored
        scored, start = end, start + stride


@torch.no_grad()
def stream_nats(
    model: PreTrainedModel,
    ids: Sequence[int] | np.ndarray,
    window: int,
    stride: int,
    batch_size: int,
    progress: bool = False,
) -> tuple[float, int]:
    """Compute the summed cross-entropy of a token stream in nats, and the number of scored tokens."""
    if not 0 < stride <= window:
        raise ValueError(f"--stride {stride}: must lie between 1 and the window of {window} tokens (--seq-length)")
    cuts = list(windows(len(ids), window, stride))
    nats = 0.0
    for batch in tqdm(list(_batches(cuts, batch_size)), unit="batch", disable=not progress):
        longest = max(end - start for start, end, _ in batch)
        inputs = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full((len(batch), longest), -100)
        for row, (start, end, scored) in enumerate(batch):
            cut = torch.from_numpy(np.asarray(ids[start : end + 1], dtype=np.int64))
            inputs[row, : end - start] = cut[:-1]  # padded on the right, which a causal model never sees
            labels[row, scored - start : end - start] = cut[scored - start + 1 :]
        logits = model(inputs.to(model.device), use_cache=False).logits
        for row_logits, row_labels in zip(logits, labels.to(logits.device), strict=True):
            nats += F.cross_entropy(row_logits.float(), row_labels, reduction="sum").double().item()
    return nats, max(len(ids) - 1, 0)


def _batches(cuts: list[tuple[int, int, int]], size: int) -> Iterable[list[tuple[int, int, int]]]:
    for first in range(0, len(cuts), size):
        yield cuts[first : first + size]
