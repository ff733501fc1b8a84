"""Each kind of tokenizer: ids as the vendor's library gives them, text back, and readable errors."""

import base64
import dataclasses
import json
from pathlib import Path

import pytest

from mesh_megatron.config.tokenizer import TokenizerConfig
from mesh_megatron.data.tokenizers import build_tokenizer, require_tokenizer
from mesh_megatron.util.hashing import hash_file

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


def test_gpt2s_two_files_are_its_tokenizer_json(tokenizer_json, tmp_path):
    from tokenizers import Tokenizer

    vocabulary, merges = map(Path, Tokenizer.from_file(str(tokenizer_json)).model.save(str(tmp_path)))
    config = TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=vocabulary, merge_file=merges)
    config.validate_tokenizer()
    tokenizer, same = require_tokenizer(config), build_tokenizer("HuggingFaceTokenizer", tokenizer_json)
    for text in (TEXT, "", "a<|endoftext|>b", "\u00e9\u4e2d\n\n  x"):
        assert tokenizer.tokenize(text) == same.tokenize(text)
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert (tokenizer.eod, tokenizer.vocab_size) == (same.eod, same.vocab_size)
    first = tokenizer.unique_identifiers
    merges.write_text("\n".join(merges.read_text().splitlines()[:-1]) + "\n")
    assert require_tokenizer(config).unique_identifiers != first
    vocabulary.write_text("{")
    with pytest.raises(ValueError, match="--vocab-file .* are not those of a byte-level BPE"):
        require_tokenizer(config)
    for changed, complaint in (
        ({"merge_file": None}, "GPT2BPETokenizer needs --merge-file"),
        ({"merge_file": tmp_path / "absent"}, "--merge-file .*absent: no such file"),
        ({"tokenizer_type": "ByteLevelTokenizer"}, "--vocab-file .* belongs to --tokenizer-type GPT2BPETokenizer"),
    ):
        with pytest.raises(ValueError, match=complaint):
            dataclasses.replace(config, **changed).validate_tokenizer()


def test_identity_follows_content_not_place(sentencepiece_model, tmp_path):
    copy = tmp_path / "elsewhere.model"
    copy.write_bytes(sentencepiece_model.read_bytes())
    first = build_tokenizer("SentencePieceTokenizer", sentencepiece_model)
    assert first.unique_identifiers == build_tokenizer("SentencePieceTokenizer", copy).unique_identifiers
    copy.write_bytes(b"other")
    assert hash_file(copy) != hash_file(sentencepiece_model)


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


def folder_with(path, config, **files):
    path.mkdir(exist_ok=True)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, lines in files.items():
        (path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return path


def bert(path, *words):
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    return folder_with(path, {"tokenizer_class": "BertTokenizer"}, vocab=(*special, *words))


def megatron_core(folder, **options):
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    return HuggingFaceTokenizer(str(folder), use_fast=True, **options)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_stored_truncation_padding_and_dropout_change_nothing(tokenizer_json, tmp_path, form):
    from tokenizers import Tokenizer

    clean = Tokenizer.from_file(str(tokenizer_json))
    expected = [clean.encode(text).ids for text in (TEXT, "x")]
    stored = Tokenizer.from_file(str(tokenizer_json))
    stored.enable_truncation(4)
    stored.enable_padding(length=16)
    stored.model.dropout = 0.9
    folder = folder_with(tmp_path / "f", {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 3})
    stored.save(str(folder / "tokenizer.json"))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder if form == "folder" else folder / "tokenizer.json")
    for _ in range(5):
        assert tokenizer.encode_batch([TEXT, "x"]) == expected
    state = json.loads(tokenizer.to_json())
    assert (state["truncation"], state["padding"], state["model"]["dropout"]) == (None, None, None)


def test_stored_sampling_changes_nothing(sentencepiece_model, tmp_path):
    """A Python tokenizer's config may ask SentencePiece to draw its pieces."""
    from mesh_megatron.data.tokenizers.stored_state import identity_of_loaded

    config = {"tokenizer_class": "BertGenerationTokenizer", "eos_token": "</s>"}
    plain, drawn = (folder_with(tmp_path / name, config) for name in ("plain", "drawn"))
    sampling = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}
    (drawn / "tokenizer_config.json").write_text(json.dumps({**config, "sp_model_kwargs": sampling}))
    for folder in (plain, drawn):
        (folder / "spiece.model").write_bytes(sentencepiece_model.read_bytes())
    first, second = (build_tokenizer("HuggingFaceTokenizer", folder) for folder in (plain, drawn))
    assert first.slow is not None and first.unique_identifiers["fingerprint"] == identity_of_loaded(first.slow)
    for _ in range(5):
        assert second.tokenize(TEXT) == first.tokenize(TEXT)


def test_split_special_tokens_are_split(tokenizer_json, tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "split_special_tokens": True}
    folder = folder_with(tmp_path / "f", config)
    (folder / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder)
    text = "a<|endoftext|>b"
    assert tokenizer.tokenize(text) == megatron_core(folder, include_special_tokens=True).text_to_ids(text)
    assert tokenizer.eod not in tokenizer.tokenize(text)
    with pytest.raises(ValueError, match="splits special tokens"):
        tokenizer.to_json()


@pytest.mark.parametrize("special", [False, True])
def test_a_separator_ends_documents_where_there_is_no_end(tmp_path, special):
    folder = bert(tmp_path / "f", "hello", "world")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder, include_special_tokens=special)
    core = megatron_core(folder, include_special_tokens=special)
    assert tokenizer.eod == core.eod == 3
    for text in ("hello", "hello [SEP] world[CLS]  hello", " [SEP]"):
        assert tokenizer.tokenize(text) == core.text_to_ids(text)


def test_identity_of_a_folder_is_what_is_loaded_from_it(tmp_path, sentencepiece_model):
    def identity(folder):
        return build_tokenizer("HuggingFaceTokenizer", folder).unique_identifiers

    first = identity(bert(tmp_path / "a", "hello", "world"))
    assert identity(bert(tmp_path / "b", "hello", "world")) == first
    assert identity(bert(tmp_path / "b", "world", "hello")) != first
    folder = bert(tmp_path / "c", "hello", "world")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("a model")
    assert identity(folder) == first
    config = {"tokenizer_class": "BertTokenizer", "eos_token": "world"}
    assert identity(folder_with(tmp_path / "c", config)) != first
    python = folder_with(tmp_path / "d", {"tokenizer_class": "BertGenerationTokenizer"})
    (python / "spiece.model").write_bytes(sentencepiece_model.read_bytes())
    before = identity(python)
    (python / "spiece.model").write_bytes(retrained())
    assert identity(python) != before


def retrained():
    """A SentencePiece model of other text."""
    import io

    import sentencepiece

    model, options = io.BytesIO(), {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["other words altogether"] * 20),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def test_a_panic_at_loading_or_decoding_is_a_value_error(tmp_path):
    lines = [base64.b64encode(bytes([i])) + b" %d" % (i % 100) for i in range(200)]  # ranks twice
    (tmp_path / "a.tiktoken").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match="--tokenizer-model .*a.tiktoken is not a tiktoken vocabulary: "):
        build_tokenizer("TikTokenizer", tmp_path / "a.tiktoken", tiktoken_pattern="cl100k")
    lines = [base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)]
    (tmp_path / "a.tiktoken").write_bytes(b"\n".join(lines))
    tokenizer = build_tokenizer("TikTokenizer", tmp_path / "a.tiktoken", tiktoken_pattern="cl100k")
    for ids in ([5000], [-1]):
        with pytest.raises(ValueError):
            tokenizer.detokenize(ids)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_what_ends_a_process_is_no_fault_of_the_text(error):
    from mesh_megatron.data.tokenizers.library_errors import as_value_error

    with pytest.raises(error), as_value_error():
        raise error


def test_a_changed_rank_file_is_read_again(tmp_path):
    """tiktoken would read the copy that it made of the first file of this name."""
    path = tmp_path / "a.tiktoken"
    for order in (range(256), reversed(range(256))):
        ranks = [bytes([byte]) for byte in order]
        path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks)))
        tokenizer = build_tokenizer("TikTokenizer", path, tiktoken_pattern="cl100k")
        assert tokenizer.tokenize("a") == [ranks.index(b"a")]
