"""gigatoken gets the texts on which it is proven to give the vendor's ids, whatever is hidden in the others."""

import base64
import json
import random
import unicodedata

import numpy as np
import pytest

from mesh_megatron.config.tokenizer import TokenizerConfig
from mesh_megatron.data.indexed import read_indexed
from mesh_megatron.data.preprocessing.preprocess import PreprocessOptions, preprocess
from mesh_megatron.data.preprocessing.readers import SplitOptions
from mesh_megatron.data.preprocessing.sources import list_sources
from mesh_megatron.data.tokenizers import build_tokenizer, probe_texts, proof_store
from mesh_megatron.data.tokenizers.charsmap import replaced_strings
from mesh_megatron.data.tokenizers.cover import Cover, Proof, ranges_of
from mesh_megatron.data.tokenizers.fast_backend import Divided, Gigatoken, Vendor
from mesh_megatron.data.tokenizers.proof import prove

ENGLISH = "The cat sat on 12 mats, didn't it?\n\n    It's  naïve.\n"
SPLITS = {
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SPLIT_AT_FOO = {"type": "Split", "pattern": {"String": "foo"}, "behavior": "Isolated", "invert": False}
# Two of every kind of character, and all of the blocks in which libraries were seen to differ.
BLOCKS = ((0, 0x250), (0x300, 0x370), (0x600, 0x700), (0x980, 0xA00), (0xC00, 0xC80), (0xE00, 0xF00), (0x1100, 0x1200))


@pytest.fixture(autouse=True)
def few_code_points(monkeypatch, tmp_path):
    """The proof itself, over fewer code points, and kept by nobody."""
    of_kind = {}
    for c in probe_texts.assigned():
        of_kind.setdefault(unicodedata.category(c), []).append(c)
    chosen = {c for members in of_kind.values() for c in (*members[:2], *members[-20:])}
    chosen |= {chr(n) for first, end in BLOCKS for n in range(first, end)} | set(
        "日本ひア한글\u212b\u2028\u2581\ufb01ſK"
    )
    chosen = sorted(c for c in chosen if unicodedata.category(c) not in ("Cn", "Co", "Cs"))
    monkeypatch.setattr(probe_texts, "assigned", lambda: chosen)
    monkeypatch.setattr(probe_texts, "CORE_LENGTH", 3)
    monkeypatch.setattr(probe_texts, "LONG_TEXTS", 50)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def byte_level(path, normalizer=None, split=None, added=(), **changes):
    """A tokenizer.json with every byte, some merges and ``added`` tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    cut = pre_tokenizers.Split(Regex(SPLITS[split]), "isolated") if split else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, level]) if split else level
    if normalizer:
        tokenizer.normalizer = getattr(normalizers, normalizer)()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([ENGLISH * 30, "กำ ໍາ é ü ñ "], trainer)
    tokenizer.add_tokens([token if isinstance(token, AddedToken) else AddedToken(token) for token in added])
    parsed = json.loads(tokenizer.to_str())
    parsed["model"].update(changes)
    path.write_text(json.dumps(parsed))
    return build_tokenizer("HuggingFaceTokenizer", path)


def sentencepiece_bpe(folder, **options):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in (ENGLISH * 30).split("\n") if line]),
        model_prefix=str(folder / "m"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return build_tokenizer("SentencePieceTokenizer", folder / "m.model")


def texts(tokens, number=3000):
    """Random texts of what people have seen libraries disagree on, ``tokens`` among it."""
    draw = random.Random(7)
    rare = [
        *probe_texts.assigned(),
        "\u1e9b\u0323",
        "\u0eb8\u0eba",
        "\u0c4d\u0c3c",
        "\u1112\u1161\u11ab",
        "\U0001f469\u200d\U0001f680",
    ]
    rare += [chr(n) for n in (0x378, 0x1C89, 0xA7DC, 0x10D50, 0xE000, 0x1FAE9, 0x323B0)]  # unassigned for some
    common = [*"abcst'S ABÉé019.,/\n\r\t -_", "  ", "'s", "'ll", "don't", "\r\n", "日本", "▁", "<s>", "<unk>", "<0x41>"]
    for _ in range(number):
        weights = draw.choice(((8, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)))
        groups = draw.choices((common, rare, list(tokens) or common), weights, k=draw.randrange(1, 14))
        yield "".join(draw.choice(group) for group in groups)


def check(tokenizer, tokens=()):
    """``prove`` says yes, what it covers gets the vendor's ids, and so does every text of a mixed batch."""
    proof = prove(tokenizer)
    assert not proof.refusal
    some = list(texts(tokens))
    assert any(map(Cover(proof), some)) and not all(map(Cover(proof), some))
    ours, theirs = Divided(tokenizer, proof, 1 << 30).encode(some), Vendor(tokenizer).encode(some)
    assert np.array_equal(ours.fast, list(map(Cover(proof), some)))
    ends = np.cumsum(theirs.lengths)
    assert np.array_equal(ours.lengths, theirs.lengths), some[int(np.argmax(ours.lengths != theirs.lengths))]
    other = np.flatnonzero(ours.ids != theirs.ids)
    assert not len(other), some[int(np.searchsorted(ends, other[0], side="right"))]
    return proof


@pytest.mark.parametrize("normalizer", [None, "NFC"])
@pytest.mark.parametrize("split", [None, "cl100k", "o200k"])
def test_byte_level(tmp_path, split, normalizer):
    added = ["<|user|>", "  ", "   ", "ab", "bc"]
    proof = check(byte_level(tmp_path / "t.json", normalizer, split, added), added)
    assert Cover(proof)(ENGLISH * 3) and proof.nfc is (normalizer == "NFC")


def test_added_tokens_that_take_more_than_their_text(tmp_path):
    from tokenizers import AddedToken

    added = [
        AddedToken("<l>", lstrip=True),
        AddedToken("<r>", rstrip=True),
        AddedToken("<w>", single_word=True),
        AddedToken("e\u0301", normalized=True),
        AddedToken("\u00fc", normalized=False),
    ]
    proof = check(
        byte_level(tmp_path / "t.json", "NFC", added=added), ["<l>", "<r>", "<w>", "e\u0301", "\u00fc", "u\u0308"]
    )
    assert {"<l>", "<r>", "<w>", "\u00e9"} <= set(proof.strings)
    assert not Cover(proof)("a <l>") and Cover(proof)("a <l")


def test_user_defined_symbols(tmp_path):
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    tokenizer = sentencepiece_bpe(tmp_path, user_defined_symbols=["<|user|>", "7"], **options)
    proof = check(tokenizer, ["<|user|>", "7"])
    assert {"<|user|>", "7"} <= set(proof.strings)


@pytest.mark.parametrize(
    "rule, spaces", [("identity", False), ("nfkc", False), ("nmt_nfkc", False), ("nmt_nfkc", True)]
)
def test_sentencepiece_normalisation(tmp_path, rule, spaces):
    proof = check(sentencepiece_bpe(tmp_path, normalization_rule_name=rule, remove_extra_whitespaces=spaces))
    assert Cover(proof)(ENGLISH.replace("\n", " ")) and not Cover(proof)("a \u2581 b")
    assert Cover(proof)("\u1112\u1161\u11ab") is (rule == "identity")
    assert not Cover(proof)("the end\x85") or not spaces


def test_rules_of_a_normaliser(tmp_path):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    options = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    tokenizer = sentencepiece_bpe(tmp_path, normalization_rule_name="nfkc", **options)
    model = ModelProto.FromString(tokenizer.processor.serialized_model_proto())
    rules = replaced_strings(model.normalizer_spec.precompiled_charsmap)
    characters = [chr(n) for n in range(0x21, 0x3400) if n != 0x2581]
    alone = {c for c in characters if tokenizer.processor.normalize(c) != c}
    assert alone == {rule for rule in rules if len(rule) == 1 and rule in characters}
    assert "e\u0301" in rules and not replaced_strings(b"")
    with pytest.raises(ValueError, match="cut off"):
        replaced_strings(model.normalizer_spec.precompiled_charsmap[:100])


def llama_like(path, folder, **changes):
    """tokenizer.json in the manner of Llama 2: SentencePiece's bytes and spaces, prefix and spaces as a normaliser."""
    tokenizer = sentencepiece_bpe(folder, normalization_rule_name="identity", remove_extra_whitespaces=False)
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    parsed = json.loads(sentencepiece_to_tokenizer_json(tokenizer.processor.serialized_model_proto()))
    parsed.update(changes)
    path.write_text(json.dumps(parsed))
    return build_tokenizer("HuggingFaceTokenizer", path)


@pytest.mark.parametrize("normalized", [True, False])
def test_llama_like(tmp_path, normalized):
    added = [
        {"id": 500 + number, "content": text, "normalized": normalized, "special": number == 0, "lstrip": False}
        | {"rstrip": False, "single_word": False}
        for number, text in enumerate(("<s>", "<|user|>"))
    ]
    check(llama_like(tmp_path / "t.json", tmp_path, added_tokens=added), ["<s>", "<|user|>"])


def test_tiktoken_ranks(tmp_path):
    tokens = [bytes([n]) for n in range(256)] + [
        b"th",
        b"the",
        b" t",
        b" th",
        b" the",
        "é".encode(),
        b"  ",
        b"    ",
        b"'s",
    ]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "t.tiktoken").write_text("\n".join(lines))
    for pattern in ("gpt2", "cl100k", "o200k"):
        check(build_tokenizer("TikTokenizer", tmp_path / "t.tiktoken", tiktoken_pattern=pattern), ["<|endoftext|>"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
    ],
)
def test_parts_of_a_model_that_gigatoken_does_not_read(tmp_path, change, message):
    assert message in prove(byte_level(tmp_path / "t.json", **change)).refusal


@pytest.mark.parametrize(
    "key, part, message",
    [
        (
            "pre_tokenizer",
            {"type": "Split", "pattern": {"String": "foo"}, "behavior": "Isolated", "invert": False},
            "foo",
        ),
        ("pre_tokenizer", {"type": "Digits", "individual_digits": True}, "Digits"),
        ("normalizer", {"type": "Lowercase"}, "Lowercase"),
        ("normalizer", {"type": "Replace", "pattern": {"String": "foo"}, "content": "bar"}, "foo"),
    ],
)
def test_steps_that_are_not_proven(tmp_path, key, part, message):
    byte_level(tmp_path / "t.json")
    parsed = json.loads((tmp_path / "t.json").read_text())
    children = {"pre_tokenizer": "pretokenizers", "normalizer": "normalizers"}[key]
    parsed[key] = {"type": "Sequence", children: [part, *([parsed[key]] if parsed[key] else [])]}
    (tmp_path / "t.json").write_text(json.dumps(parsed))
    assert message in prove(build_tokenizer("HuggingFaceTokenizer", tmp_path / "t.json")).refusal


def test_equal_scores_are_refused(tmp_path):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    tokenizer = sentencepiece_bpe(tmp_path)
    model = ModelProto.FromString(tokenizer.processor.serialized_model_proto())
    for piece in [piece for piece in model.pieces if piece.type == ModelProto.SentencePiece.NORMAL][:2]:
        piece.score = -1.0
    (tmp_path / "m.model").write_bytes(model.SerializeToString())
    assert "score" in prove(build_tokenizer("SentencePieceTokenizer", tmp_path / "m.model")).refusal


def different(monkeypatch, where):
    """gigatoken gives another id at the end of each text that ``where`` is true of."""
    encode = Gigatoken.encode

    def changed(self, some):
        encoded = encode(self, some)
        ids = np.array(encoded.ids)
        for text, end, length in zip(some, np.cumsum(encoded.lengths), encoded.lengths, strict=True):
            if length and where(text):
                ids[end - 1] += 1
        return encoded._replace(ids=ids)

    monkeypatch.setattr(Gigatoken, "encode", changed)


def test_every_kind_of_difference_is_found(tmp_path, monkeypatch):
    tokenizer = byte_level(tmp_path / "t.json", added=["<|user|>"])
    with monkeypatch.context() as patch:  # a code point before 's
        different(patch, lambda text: "\u0e8d's" in text)
        assert not Cover(prove(tokenizer))("\u0e8d") and Cover(prove(tokenizer))("\u0e8c")
    with monkeypatch.context() as patch:  # a class after another
        different(patch, lambda text: any(unicodedata.category(c) == "Mc" for c in text.partition("\t\t")[2][:1]))
        cover = Cover(prove(tokenizer))
        assert not (cover("\t") and cover("\u0903")) and cover(ENGLISH)
    with monkeypatch.context() as patch:  # an added token at an edge
        different(patch, lambda text: text.startswith("<|user|> "))
        assert prove(tokenizer).strings == ("<|user|>",)
    with monkeypatch.context() as patch:  # a merge
        different(patch, lambda text: "didn" in text)
        assert "other ids" in prove(tokenizer).refusal
    with monkeypatch.context() as patch:  # everything
        different(patch, lambda text: "a" in text)
        assert "other ids" in prove(tokenizer).refusal


def test_a_class_that_no_merge_of_the_vocabulary_shows(tmp_path, monkeypatch):
    """Two libraries that split "x1" differently give the same ids as long as nothing merges there."""
    from mesh_megatron.data.tokenizers.instrument import instrument

    tokenizer = byte_level(tmp_path / "t.json", split="cl100k")
    with instrument(tokenizer) as bare:
        whole, apart = bare.tokenize("\u0e8da"), bare.tokenize("\u0e8d") + bare.tokenize("a")
        assert whole != apart and bare.tokenize("1\u0e50") != bare.tokenize("1") + bare.tokenize("\u0e50")
    assert tokenizer.tokenize("\u0e8da") == tokenizer.tokenize("\u0e8d") + tokenizer.tokenize("a")


def test_cover():
    cover = Cover(Proof(ranges=ranges_of("abc \u00e9\u0301"), strings=("ab", "a c"), nfc=True))
    assert [cover(t) for t in ("b a", "", "abc", "a cb", "d", "b\u0301", "\u00e9", "c\u0301")] == [
        *(True, True, False, False, False, True, True, False)
    ]
    assert not Cover(Proof(refusal="no"))("a") and not Cover(Proof())("")
    assert ranges_of("cab\U0001f600") == ((97, 99), (0x1F600, 0x1F600))


def test_a_proof_is_kept_and_found_again(tmp_path, monkeypatch):
    from mesh_megatron.data.tokenizers import proof

    tokenizer, calls = byte_level(tmp_path / "t.json"), []
    original = proof.prove
    monkeypatch.setattr(proof, "prove", lambda t: calls.append(t) or original(t))
    first = proof_store.proof_of(tokenizer)
    assert proof_store.proof_of(tokenizer) == first and len(calls) == 1 and not first.refusal
    (path,) = proof_store.folder().iterdir()
    path.write_text(path.read_text()[:-40])  # cut off: proven and written again
    assert proof_store.proof_of(tokenizer) == first and len(calls) == 2
    path.write_text(path.read_text().replace('"nfc": false', '"nfc": true'))  # changed
    assert proof_store.proof_of(tokenizer) == first and len(calls) == 3
    for name, value in (("_version", lambda library: "2"), ("VERSION", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(proof_store, name, value)
            proof_store.proof_of(tokenizer)
    assert len(calls) == 5
    proof_store.proof_of(byte_level(tmp_path / "t.json", added=["<x>"]))
    assert len(calls) == 6 and len(list(proof_store.folder().iterdir())) == 4


def test_a_proof_without_a_place_to_be_kept(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file")
    assert not proof_store.proof_of(byte_level(tmp_path / "t.json")).refusal


def test_documents_go_both_ways_and_are_counted(tmp_path):
    """Marks that libraries put into different orders, among a thousand plain documents."""
    tokenizer = byte_level(tmp_path / "t.json", "NFC")
    documents = [f"plain English words {number}" for number in range(1000)]
    documents[901:901] = ["\u0eab\u0ebc\u0eb2\u0e8d \u0e81\u0eb8\u0eba \u0c15\u0c4d\u0c3c", "caf\u00e9", "cafe\u0301"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=tmp_path / "t.json")
    sources = list_sources([str(tmp_path / "a.jsonl")])
    options = PreprocessOptions(show_progress=False)
    summary = preprocess(sources, str(tmp_path / "o"), config, SplitOptions(), options)
    assert "1,001 by gigatoken, 2 by the tokenizer's own library" in str(summary)
    file = read_indexed(summary.prefixes[0])
    assert [file.document(n).tolist() for n in range(1003)] == tokenizer.encode_batch(documents)
    options = PreprocessOptions(show_progress=False, backend="vendor", overwrite=True)
    summary = preprocess(sources, str(tmp_path / "o"), config, SplitOptions(), options)
    assert "all by the tokenizer's own library (asked for)" in str(summary)
