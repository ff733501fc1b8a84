"""gigatoken is used where it gives the vendor's ids, and only there."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh_megatron.data import backend
from mesh_megatron.data.backend import Gigatoken, Vendor, choose_backend, load_gigatoken, require_equal
from mesh_megatron.data.tokenizers import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json):
    return build_tokenizer("HuggingFaceTokenizer", tokenizer_json)


@pytest.fixture(scope="module")
def fast(tokenizer):
    return Gigatoken(tokenizer)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(), min_size=1, max_size=5))
def test_same_ids_on_any_text(tokenizer, fast, texts):
    require_equal(fast, Vendor(tokenizer), texts)


def test_is_chosen_for_what_it_can_load(tokenizer):
    assert choose_backend(tokenizer, "auto", ["some text"])[0] == "gigatoken"
    assert choose_backend(tokenizer, "vendor", ["some text"]) == ("vendor", "asked for")


def test_other_tokenizers_fall_back(tmp_path):
    null = build_tokenizer("ByteLevelTokenizer")
    assert choose_backend(null, "auto", ["some text"]) == ("vendor", "gigatoken has no ByteLevelTokenizer")
    with pytest.raises(ValueError, match="--tokenizer-backend gigatoken: .*use --tokenizer-backend vendor"):
        choose_backend(null, "gigatoken", ["some text"])


def test_other_ids_are_found_and_not_used(tokenizer, monkeypatch):
    class Wrong(Gigatoken):
        def encode(self, texts):
            encoded = super().encode(texts)
            ids = np.array(encoded.ids)
            if any("special case" in text for text in texts):
                ids[-1] += 1
            return encoded._replace(ids=ids)

    monkeypatch.setattr(backend, "Gigatoken", Wrong)
    assert choose_backend(tokenizer, "auto", ["plain"])[0] == "gigatoken"
    name, reason = choose_backend(tokenizer, "auto", ["plain", "a special case"])
    assert name == "vendor" and "other ids than the vendor's library" in reason and "special case" in reason
    with pytest.raises(ValueError, match="other ids"):
        choose_backend(tokenizer, "gigatoken", ["a special case"])


def test_cache_is_bounded(tokenizer, monkeypatch):
    loads = []
    monkeypatch.setattr(backend, "load_gigatoken", lambda t: loads.append(1) or load_gigatoken(t))
    fast = Gigatoken(tokenizer, cache_bytes=-1)  # anything is too much
    expected = Vendor(tokenizer).encode(["words", "and words"])
    for _ in range(3):
        assert np.array_equal(fast.encode(["words", "and words"]).ids, expected.ids)
    assert len(loads) == 4
    roomy = Gigatoken(tokenizer)
    roomy.encode(["words"])
    assert len(loads) == 5


def test_sentencepiece_bpe_and_unigram(tmp_path):
    import sentencepiece

    for kind, chosen in (("bpe", "gigatoken"), ("unigram", "vendor")):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat, 123 naïve cats"] * 30),
            model_prefix=str(tmp_path / kind),
            vocab_size=290 if kind == "bpe" else 280,
            model_type=kind,
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        tokenizer = build_tokenizer("SentencePieceTokenizer", tmp_path / f"{kind}.model")
        assert choose_backend(tokenizer, "auto", ["the cat  sat"])[0] == chosen
