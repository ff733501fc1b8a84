"""Exported tokenizers give the ids of training; what cannot is refused."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig

from mesh_megatron.config.tokenizer import TokenizerConfig
from mesh_megatron.data.check import check_ids as check_data
from mesh_megatron.data.indexed import IndexedFile
from mesh_megatron.data.tokenizers import build_tokenizer, require_tokenizer
from mesh_megatron.hf.importing import copy_tokenizer
from mesh_megatron.hf.tokenizer import SAMPLES, check_ids, export_tokenizer, load_tokenizer, sentencepiece_to_fast

CODE = Path(__file__).read_text(encoding="utf-8") + Path(sentencepiece.__file__).read_text(encoding="utf-8")
CONFIG = GPTNeoXConfig(max_position_embeddings=32)
WHITE_SPACE_COUNTS = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
}
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SYMBOLS = ["<|sep|>", "return", "<|sep|>+"]
SENTENCEPIECE = {
    "bpe for code": {"model_type": "bpe", **WHITE_SPACE_COUNTS},
    "bpe with white space in pieces": {
        "model_type": "bpe", **WHITE_SPACE_COUNTS, "allow_whitespace_only_pieces": True, "split_by_whitespace": False,
        "user_defined_symbols": ["\n", "\t", "▁▁▁▁"],
    },
    "bpe by default": {"model_type": "bpe"},
    "bpe with symbols": {"model_type": "bpe", "user_defined_symbols": SYMBOLS},
    "bpe with symbols, without bytes": {
        "model_type": "bpe", "byte_fallback": False, "user_defined_symbols": SYMBOLS, "vocab_size": 700,
    },
    "bpe of lines": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "llama's": {"model_type": "bpe", **LLAMA},
    "llama's with symbols": {"model_type": "bpe", **LLAMA, "user_defined_symbols": [*SYMBOLS, "\n"]},
    "unigram with symbols": {"model_type": "unigram", "vocab_size": 700, "user_defined_symbols": SYMBOLS},
    "unigram by default": {"model_type": "unigram", "vocab_size": 700},
    "unigram for code": {"model_type": "unigram", "vocab_size": 700, **WHITE_SPACE_COUNTS},
}  # fmt: skip


def train_sentencepiece(prefix: Path, **options) -> Path:
    pieces = [CODE[start : start + 2000] for start in range(0, len(CODE), 2000)]
    defaults = {"vocab_size": 900, "byte_fallback": True, "max_sentence_length": 10000, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pieces), model_prefix=str(prefix), **{**defaults, **options}
    )
    return Path(f"{prefix}.model")


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_ids(tmp_path, kind):
    model = train_sentencepiece(tmp_path / "spm", **SENTENCEPIECE[kind])
    trained = build_tokenizer("SentencePieceTokenizer", model)
    export_tokenizer(trained, tmp_path, CONFIG)
    exported = load_tokenizer(tmp_path, CONFIG)
    random.seed(0)
    letters = "ab  \n\t_()=.é中🙂"
    noise = ["".join(random.choices(letters, k=40)) for _ in range(300)]
    around = [*SYMBOLS, " ", "  ", "\n", "a", "self", "<0x41>", "<unk>", "</", "中"]
    noise += ["".join(random.choices(around, k=random.randint(1, 5))) for _ in range(300)]
    texts = [*SAMPLES, *SYMBOLS, *noise, *(CODE[start : start + 500] for start in range(0, 20000, 500))]
    for text in texts:
        ids = trained.tokenize(text)
        exported_ids = exported(text, verbose=False)["input_ids"]
        if exported_ids != ids:  # two ways to cut a text may be equally likely, to the last bit of a float
            assert kind.startswith("unigram")
            scores = [sum(map(trained.processor.get_score, way)) for way in (ids, exported_ids)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-3)
        assert exported.decode(exported_ids) == trained.detokenize(ids)
    assert exported.eos_token_id == trained.eod == exported.pad_token_id


def test_a_symbol_that_normalisation_changes_is_refused(tmp_path):
    model = train_sentencepiece(tmp_path / "spm", model_type="bpe", user_defined_symbols=["ﬁ"])  # a ligature
    with pytest.raises(ValueError, match="encodes 'ﬁ' as .* and training encoded it as"):
        export_tokenizer(build_tokenizer("SentencePieceTokenizer", model), tmp_path, CONFIG)


def test_byte_level_ids(tmp_path):
    trained = build_tokenizer("ByteLevelTokenizer")
    export_tokenizer(trained, tmp_path, CONFIG)
    exported = load_tokenizer(tmp_path, CONFIG)
    assert exported("aé\x00")["input_ids"] == [97, 195, 169, 0] and exported.eos_token_id == 256
    assert exported.decode([97, 195, 169, 10]) == "aé\n"


@pytest.mark.parametrize("form", ["file", "folder", "two files"])
def test_hugging_face_ids(tmp_path, form):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [CODE], trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    source = tmp_path / "source"
    source.mkdir()
    inner.save(str(source / "tokenizer.json"))
    if form == "two files":
        vocabulary, merges = inner.model.save(str(source))
        files = {"vocab_file": Path(vocabulary), "merge_file": Path(merges)}
        trained = require_tokenizer(TokenizerConfig(tokenizer_type="GPT2BPETokenizer", **files))
    else:
        trained = build_tokenizer("HuggingFaceTokenizer", source if form == "folder" else source / "tokenizer.json")
    export_tokenizer(trained, tmp_path, CONFIG)
    exported = load_tokenizer(tmp_path, CONFIG)
    assert exported(CODE[:500], verbose=False)["input_ids"] == trained.tokenize(CODE[:500])
    assert exported.eos_token == "<|endoftext|>" and exported.model_max_length == 32


def test_tiktoken_ids(tmp_path):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is an optional tokenizer library")
    import base64

    ranks = {bytes([byte]): byte for byte in range(256)}
    for merge in (b"re", b"et", b"ret", b"  ", b"    ", b"in", b" in", b"def", b"de"):
        ranks.setdefault(merge, len(ranks))
    file = tmp_path / "small.tiktoken"
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    assert tiktoken.__version__
    trained = build_tokenizer("TikTokenizer", file, tiktoken_pattern="cl100k")
    export_tokenizer(trained, tmp_path, CONFIG)
    exported = load_tokenizer(tmp_path, CONFIG)
    assert exported(CODE[:2000], verbose=False)["input_ids"] == trained.tokenize(CODE[:2000])
    assert exported.eos_token_id == trained.eod == len(ranks)


def test_data_of_the_training_tokenizer_goes_with_its_export(tmp_path):
    trained = build_tokenizer("ByteLevelTokenizer")
    prefix = str(tmp_path / "data")
    made_with = {"identity": trained.unique_identifiers, "vocab_size": 257, "eod": 256}
    Path(prefix + ".json").write_text(json.dumps({"format": "mesh_megatron", "tokenizer": made_with}))
    data = IndexedFile(prefix, np.array([104, 105, 256]), np.array([3]), np.array([0]), np.array([0, 1]))
    for name in ("first", "second"):  # an export of an import's export, too
        folder, copied = tmp_path / name, tmp_path / f"{name}_import"
        export_tokenizer(trained, folder, CONFIG)
        assert copy_tokenizer(folder, copied)
        trained = build_tokenizer("HuggingFaceTokenizer", copied)
        check_data("--data-path", data, trained, 300)
    unverified = build_tokenizer("HuggingFaceTokenizer", copied, include_special_tokens=False)
    with pytest.raises(ValueError, match=r"another tokenizer, ByteLevelTokenizer, than --tokenizer-type Hugg.*: give"):
        check_data("--data-path", data, unverified, 300)
    content = json.loads((copied / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"!": 34, '"': 33}  # two ids change places
    (copied / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"another tokenizer, ByteLevelTokenizer, than"):
        check_data("--data-path", data, build_tokenizer("HuggingFaceTokenizer", copied), 300)


def test_a_tokenizer_that_differs_is_refused(tmp_path):
    @dataclass
    class Shifted:
        inner: object
        kind: str
        model: Path
        eod: int

        def tokenize(self, text):
            return [token + 1 for token in self.inner.tokenize(text)]

    model = train_sentencepiece(tmp_path / "spm", **SENTENCEPIECE["bpe for code"])
    inner = build_tokenizer("SentencePieceTokenizer", model)
    with pytest.raises(ValueError, match="encodes ' ' as .* and training encoded it as"):
        export_tokenizer(Shifted(inner, inner.kind, model, inner.eod), tmp_path, CONFIG)
    with pytest.raises(ValueError, match="'b' as"):
        check_ids(lambda text: [1], lambda text: [len(text) + (text == "b")], ["a", "b"])


def test_what_has_no_hugging_face_form(tmp_path):
    with pytest.raises(ValueError, match="NullTokenizer has no Hugging Face form.*--no-tokenizer"):
        export_tokenizer(build_tokenizer("NullTokenizer", vocab_size=9), tmp_path, CONFIG)
    model = train_sentencepiece(tmp_path / "char", model_type="char", vocab_size=300, hard_vocab_limit=False)
    with pytest.raises(ValueError, match="only BPE and unigram"):
        sentencepiece_to_fast(model)
