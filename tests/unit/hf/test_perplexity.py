"""Every token is scored once, with the context that the stride promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hf_models import VOCABULARY

from mesh_megatron.hf.perplexity import Perplexity, stream_nats, windows


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("length", [2, 8, 9, 10, 17, 40])
def test_windows(length, stride):
    scored = []
    for start, end, first in windows(length, 8, stride):
        assert end - start <= 8 and start <= first
        assert first == 0 or first - start >= 8 - stride
        scored += range(first, end)
    assert scored == list(range(length - 1))


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 5, 8])
def test_sums_are_those_of_single_predictions(make_model, stride):
    model = make_model()
    stream = np.random.default_rng(0).integers(0, VOCABULARY, 30).astype(np.uint16)
    expected = 0.0
    for start, end, first in windows(len(stream), 8, stride):
        logits = model(torch.from_numpy(stream[start:end].astype(np.int64))[None]).logits[0].log_softmax(-1)
        expected -= sum(logits[i - start, int(stream[i + 1])].item() for i in range(first, end))
    for batch_size in (1, 4):
        nats, tokens = stream_nats(model, stream, 8, stride, batch_size)
        assert tokens == 29 and nats == pytest.approx(expected, rel=1e-6)


def test_bad_strides(make_model):
    for stride in (0, 9):
        with pytest.raises(ValueError, match=f"--stride {stride}: must lie between 1 and the window of 8"):
            stream_nats(make_model(), [1, 2, 3], 8, stride, 1)


def test_units():
    numbers = (Perplexity(10.0, 4, 2, 16) + Perplexity(6.0, 4, 2, 16)).to_dict()
    assert numbers["loss"] == 2.0 and numbers["perplexity"] == math.exp(2)
    assert numbers["word_perplexity"] == math.exp(4) and numbers["byte_perplexity"] == math.exp(0.5)
    assert numbers["bits_per_byte"] == pytest.approx(0.5 / math.log(2))
    unknown = Perplexity(10.0, 4).to_dict()
    assert unknown["words"] is None and unknown["bits_per_byte"] is None
    assert Perplexity(1e6, 2, 1, 1).to_dict()["word_perplexity"] == math.inf
    assert math.isnan(Perplexity(math.nan, 2).to_dict()["perplexity"])  # a broken model's, and not an overflow
