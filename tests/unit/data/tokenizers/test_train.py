"""Trained tokenizers: lossless where they promise it, complete or absent, with errors a user can fix."""

import gzip

import pytest

from mesh_megatron.commands import train_tokenizer
from mesh_megatron.data.preprocessing.readers import SplitOptions
from mesh_megatron.data.preprocessing.sources import list_sources
from mesh_megatron.data.tokenizers import build_tokenizer
from mesh_megatron.data.tokenizers.train import Corpus, SentencePieceOptions, train_byte_level_bpe, train_sentencepiece

CODE = (
    "def function(argument):\n    if argument > 0:\n\t\treturn  argument + 12345\n\n\nclass Name:\n    pass  # naïve\n"
)
UNSEEN = "  leading\n\n\ttab  日本 🙂 <s> </s> <unk> \r\n trailing  "


@pytest.fixture
def corpus(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(CODE * 20)
    (tmp_path / "empty.txt").write_text("")
    return Corpus(list_sources([str(tmp_path)]), SplitOptions("file"))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_with_byte_fallback_is_lossless(tmp_path, corpus, model_type):
    prefix = str(tmp_path / "new" / "tok")
    path = train_sentencepiece(
        corpus, prefix, SentencePieceOptions(model_type=model_type, vocab_size=294, byte_fallback=True)
    )
    tokenizer = build_tokenizer("SentencePieceTokenizer", path)
    assert tokenizer.vocab_size == 294 and tokenizer.eod == 2 and corpus.documents == 5
    for text in (CODE, UNSEEN):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert len((tmp_path / "new" / "tok.vocab").read_text().splitlines()) >= 294


def test_sentencepiece_without_byte_fallback_knows_newlines(tmp_path, corpus):
    path = train_sentencepiece(corpus, str(tmp_path / "tok"), SentencePieceOptions(model_type="bpe", vocab_size=100))
    tokenizer = build_tokenizer("SentencePieceTokenizer", path)
    assert tokenizer.detokenize(tokenizer.tokenize(CODE)) == CODE


def test_byte_level_bpe_is_lossless(tmp_path, corpus):
    path = train_byte_level_bpe(corpus, str(tmp_path / "tok"), vocab_size=300, special_tokens=["<|user|>"])
    tokenizer = build_tokenizer("HuggingFaceTokenizer", path)
    assert tokenizer.vocab_size == 300 and tokenizer.eod == 0
    for text in (CODE, UNSEEN):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert len(tokenizer.tokenize("<|user|>")) == 1


def test_errors_name_the_flag(tmp_path, corpus):
    with pytest.raises(ValueError, match=r"--vocab-size 30000: .*too high.* <= \d+"):
        train_sentencepiece(corpus, str(tmp_path / "tok"), SentencePieceOptions(model_type="unigram", vocab_size=30000))
    with pytest.raises(ValueError, match="--vocab-size 100: the bytes and special tokens alone need 257"):
        train_byte_level_bpe(corpus, str(tmp_path / "tok"), vocab_size=100)
    (tmp_path / "bad.txt").write_bytes(b"one\n\xff")
    bad = Corpus(list_sources([str(tmp_path / "bad.txt")]), SplitOptions("line"))
    with pytest.raises(ValueError, match="bad.txt, line 2: invalid UTF-8"):
        train_sentencepiece(bad, str(tmp_path / "tok"), SentencePieceOptions(model_type="bpe", vocab_size=300))
    with pytest.raises(ValueError, match="no documents"):
        train_byte_level_bpe(Corpus(list_sources([str(tmp_path / "empty.txt")]), SplitOptions()), "x", vocab_size=300)
    for tokens, complaint in ((["<|a|>", ""], "'': is empty"), (["<|a|>", "b", "<|a|>"], r"<\|a\|>: listed twice")):
        with pytest.raises(ValueError, match=f"--special-tokens {complaint}"):
            train_byte_level_bpe(corpus, str(tmp_path / "tok"), vocab_size=300, special_tokens=tokens)
        options = SentencePieceOptions(model_type="bpe", vocab_size=300, user_defined_symbols=tokens)
        with pytest.raises(ValueError, match=f"--special-tokens {complaint}"):
            train_sentencepiece(corpus, str(tmp_path / "tok"), options)
    options = SentencePieceOptions(model_type="bpe", vocab_size=300, user_defined_symbols=["</s>"])
    with pytest.raises(ValueError, match="--special-tokens </s>: SentencePiece has it as a control symbol"):
        train_sentencepiece(corpus, str(tmp_path / "tok"), options)
    assert not list(tmp_path.glob("tok*"))
    bad.on_error = "skip"
    train_byte_level_bpe(bad, str(tmp_path / "tok"), vocab_size=300)
    assert bad.left_out == 1


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "byte-level-bpe"])
def test_an_error_far_into_the_corpus_is_its_own_in_one_line(tmp_path, corpus, model_type):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    bad = Corpus([*corpus.sources, *list_sources([str(tmp_path / "bad.jsonl")])], SplitOptions())
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: broken JSON .*--on-error skip$") as caught:
        if model_type == "byte-level-bpe":
            train_byte_level_bpe(bad, str(tmp_path / "tok"), vocab_size=300)
        else:
            train_sentencepiece(bad, str(tmp_path / "tok"), SentencePieceOptions(model_type=model_type, vocab_size=300))
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_an_interrupt_while_the_corpus_is_read_is_an_interrupt(tmp_path, corpus, monkeypatch):
    def interrupted(self):
        yield "text"
        raise KeyboardInterrupt

    monkeypatch.setattr(Corpus, "_texts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_sentencepiece(corpus, str(tmp_path / "tok"), SentencePieceOptions(model_type="bpe", vocab_size=300))


def test_the_size_that_came_out_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"ab abab") + b"trailing bytes, which cost no document")
    words = ["--input", f"{tmp_path}/a.txt.gz", "--output", f"{tmp_path}/tok", "--model-type", "byte-level-bpe"]
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", *words, "--vocab-size", "300"])
    assert train_tokenizer.main() == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.endswith(f": {build_tokenizer('HuggingFaceTokenizer', tmp_path / 'tok.json').vocab_size} entries, "
                          "trained on 1 documents")  # fmt: skip
    assert second == "the text has no more than that; --vocab-size 300 needs more of it"
