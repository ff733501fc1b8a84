"""gigatoken is used where it gives the vendor's ids, and only there."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh_megatron.data.tokenizers import build_tokenizer, fast_backend
from mesh_megatron.data.tokenizers.cover import Proof
from mesh_megatron.data.tokenizers.fast_backend import (
    Divided,
    Gigatoken,
    Vendor,
    load_gigatoken,
    make_backend,
    require_equal,
)
from mesh_megatron.data.tokenizers.proof import prove
from mesh_megatron.data.tokenizers.proof_store import choose


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json):
    return build_tokenizer("HuggingFaceTokenizer", tokenizer_json)


@pytest.fixture(scope="module")
def fast(tokenizer):
    return Divided(tokenizer, choose(tokenizer, "gigatoken"), 1 << 30)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(), min_size=1, max_size=5))
def test_same_ids_on_any_text(tokenizer, fast, texts):
    require_equal(fast, Vendor(tokenizer), texts)


def test_each_text_goes_where_it_may(tokenizer):
    divided = Divided(tokenizer, Proof(ranges=((32, 122),), strings=("<x>",)), 1 << 30)
    texts = ["plain", "naïve", "", "with <x>", "\n", "more plain text"]
    encoded, expected = divided.encode(texts), Vendor(tokenizer).encode(texts)
    assert encoded.fast.tolist() == [True, False, True, False, False, True]
    assert np.array_equal(encoded.ids, expected.ids) and np.array_equal(encoded.lengths, expected.lengths)
    assert divided.encode(texts[:1]).fast.tolist() == [True] and divided.encode(texts[1:2]).fast.tolist() == [False]


def test_other_tokenizers_fall_back():
    null = build_tokenizer("ByteLevelTokenizer")
    assert choose(null, "auto").refusal == "gigatoken has no ByteLevelTokenizer"
    assert make_backend(null, choose(null, "auto"), 0).name == "vendor"
    with pytest.raises(ValueError, match="--tokenizer-backend gigatoken: .*use --tokenizer-backend vendor"):
        choose(null, "gigatoken")


def test_the_vendor_can_be_asked_for(tokenizer):
    assert choose(tokenizer, "vendor").refusal == "asked for"


def test_a_panic_of_gigatoken_is_a_refusal(tokenizer, monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(text):
        raise PanicException("index out of bounds")

    monkeypatch.setattr("gigatoken.Tokenizer.from_json", panic)
    with pytest.raises(ValueError, match="index out of bounds"):
        load_gigatoken(tokenizer)


def test_cache_is_bounded(tokenizer, monkeypatch):
    loads = []
    monkeypatch.setattr(fast_backend, "load_gigatoken", lambda t: loads.append(1) or load_gigatoken(t))
    fast = Gigatoken(tokenizer, cache_bytes=-1)  # anything is too much
    expected = Vendor(tokenizer).encode(["words", "and words"])
    for _ in range(3):
        assert np.array_equal(fast.encode(["words", "and words"]).ids, expected.ids)
    assert len(loads) == 4
    roomy = Gigatoken(tokenizer)
    roomy.encode(["words"])
    assert len(loads) == 5


def test_unigram_models_are_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat, 123 naïve cats"] * 30),
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=280,
        model_type="unigram",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = build_tokenizer("SentencePieceTokenizer", tmp_path / "unigram.model")
    assert "unigram" in prove(tokenizer).refusal
