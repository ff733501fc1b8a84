"""Each kind of tokenizer: ids as the vendor's library gives them, text back, and readable errors."""

import base64
import json

import pytest

from mesh_megatron.data.tokenizers import build_tokenizer, fingerprint

TEXT = "def f(x):\n    return x + 1  # naïve 🙂\n"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    import sentencepiece

    prefix = tmp_path_factory.mktemp("sp") / "tok"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20),
        model_prefix=str(prefix),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_sentencepiece(sentencepiece_model):
    import sentencepiece

    tokenizer = build_tokenizer("SentencePieceTokenizer", sentencepiece_model)
    vendor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert tokenizer.tokenize(TEXT) == vendor.encode(TEXT)
    assert tokenizer.encode_batch([TEXT, "", "x"]) == [vendor.encode(t) for t in (TEXT, "", "x")]
    assert tokenizer.eod == vendor.eos_id() == 2
    assert tokenizer.vocab_size == vendor.get_piece_size()


def test_hugging_face_file_and_folder(tokenizer_json):
    from tokenizers import Tokenizer

    vendor = Tokenizer.from_file(str(tokenizer_json))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_json)
    assert tokenizer.tokenize(TEXT) == vendor.encode(TEXT).ids
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT
    assert tokenizer.eod == vendor.token_to_id("<|endoftext|>")
    assert tokenizer.vocab_size == vendor.get_vocab_size()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tokenizer_json.parent / "tokenizer_config.json").write_text(json.dumps(config))
    folder = build_tokenizer("HuggingFaceTokenizer", tokenizer_json.parent)
    assert folder.tokenize(TEXT) == vendor.encode(TEXT).ids
    assert folder.eod == tokenizer.eod


def test_tiktoken_ranks_and_megatron_json(tmp_path):
    ranks = [bytes([i]) for i in range(256)] + [b"re", b"ret"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks)]
    (tmp_path / "a.tiktoken").write_bytes(b"\n".join(lines))
    plain = build_tokenizer("TikTokenizer", tmp_path / "a.tiktoken", tiktoken_pattern="cl100k")
    assert plain.vocab_size == 259 and plain.eod == 258
    assert plain.tokenize("ret") == [257]
    assert plain.detokenize(plain.tokenize(TEXT)) == TEXT
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode("latin1")}
        for rank, token in enumerate(ranks)
    ]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    megatron = build_tokenizer("TikTokenizer", tmp_path / "a.json", tiktoken_num_special_tokens=10)
    assert megatron.vocab_size == 268 and megatron.eod == 2
    assert megatron.tokenize("ret") == [267]
    assert megatron.detokenize(megatron.tokenize(TEXT)) == TEXT


def test_bytes_and_null():
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    assert tokenizer.tokenize("é") == [0xC3, 0xA9]
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT
    assert tokenizer.eod == 256 and tokenizer.vocab_size == 257
    null = build_tokenizer("NullTokenizer", vocab_size=100)
    assert null.tokenize("5 99 3\n") == [5, 99, 3]
    assert null.eod == 100 and null.vocab_size == 101


def test_identity_follows_content_not_place(sentencepiece_model, tmp_path):
    copy = tmp_path / "elsewhere.model"
    copy.write_bytes(sentencepiece_model.read_bytes())
    first = build_tokenizer("SentencePieceTokenizer", sentencepiece_model)
    assert first.unique_identifiers == build_tokenizer("SentencePieceTokenizer", copy).unique_identifiers
    copy.write_bytes(b"other")
    assert fingerprint(copy) != fingerprint(sentencepiece_model)


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer"])
def test_readable_errors(tmp_path, kind):
    with pytest.raises(ValueError, match="needs --tokenizer-model"):
        build_tokenizer(kind)
    with pytest.raises(ValueError, match="no such file"):
        build_tokenizer(kind, tmp_path / "absent")
    broken = tmp_path / "broken.json"
    broken.write_bytes(b"no tokenizer")
    with pytest.raises(ValueError, match=r"--tokenizer-model .*broken.json is no"):
        build_tokenizer(kind, broken)
