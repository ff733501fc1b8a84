"""Train a tokenizer on text: SentencePiece (unigram or BPE) or byte-level BPE. See docs/data.md."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mesh_megatron.config.bounds import Bounds, Count
from mesh_megatron.util.atomic_files import prepare_file
from mesh_megatron.util.cores import cores


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a tokenizer on the same inputs as preprocess_data.py."""

    input: tuple[str, ...]
    """Files, globs and folders, as for preprocess_data.py; - reads standard input."""
    output: str
    """Path without a suffix: writes OUTPUT.model and OUTPUT.vocab (SentencePiece), or OUTPUT.json (byte-level-bpe)."""
    model_type: Literal["unigram", "bpe", "byte-level-bpe"] = "bpe"
    """Algorithm: unigram and bpe are SentencePiece's; byte-level-bpe is GPT-2's, as a Hugging Face tokenizer.json."""
    vocab_size: Count = 32768
    """Size of the vocabulary, including special tokens."""
    byte_fallback: bool = False
    """SentencePiece: encode characters outside the vocabulary as bytes, so that no text is unknown."""
    character_coverage: Annotated[float, Bounds(above=0, most=1)] = 0.9995
    """SentencePiece: fraction of the text's characters that get their own entry."""
    split_digits: bool = False
    """SentencePiece: make every digit its own token."""
    normalization: Literal["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"] = "identity"
    """SentencePiece: normalization of text before it is split; identity leaves it unchanged."""
    special_tokens: tuple[str, ...] = ()
    """Additional entries that are never split."""
    input_sentence_size: Count = 5_000_000
    """SentencePiece: number of lines, drawn at random, to train on and hold in memory."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys (columns) to read from each record."""
    document_separator: str = "blank-line"
    """Separator of documents in a text file: blank-line, line, file, or a text such as '<|endoftext|>'."""
    text_suffixes: tuple[str, ...] = ()
    """Additional suffixes of files to read as text, such as .py .md."""
    stdin_format: Literal["jsonl", "text"] = "jsonl"
    """Format of standard input."""
    max_document_bytes: Count = 64 << 20
    """Largest size of a line or document; a longer one is an error."""
    on_error: Literal["stop", "skip"] = "stop"
    """Action for a document that cannot be used: stop and report file and line, or skip it."""
    workers: Count = cores()
    """Number of threads."""


def main() -> int:
    from mesh_megatron.config.cli import parse, run

    args = parse(Arguments, description=__doc__)
    return run(lambda: train_and_report(args))


def train_and_report(args: Arguments) -> None:
    """Write the tokenizer and print what it was trained on and how to use it."""
    from mesh_megatron.data.preprocessing.readers import SplitOptions
    from mesh_megatron.data.preprocessing.sources import list_sources, told
    from mesh_megatron.data.tokenizers import build_tokenizer, train

    prepare_file(Path(f"{args.output}.{'json' if args.model_type == 'byte-level-bpe' else 'model'}"), "--output")
    split_options = SplitOptions(args.document_separator, args.json_keys, args.max_document_bytes)
    passed_over: Counter[str] = Counter()
    sources = list_sources(
        args.input, text_suffixes=args.text_suffixes, stdin_format=args.stdin_format, passed_over=passed_over
    )
    corpus = train.Corpus(sources, split_options, args.on_error)
    if args.model_type == "byte-level-bpe":
        kind = "HuggingFaceTokenizer"
        path = train.train_byte_level_bpe(
            corpus, args.output, vocab_size=args.vocab_size, special_tokens=args.special_tokens
        )
    else:
        kind = "SentencePieceTokenizer"
        options = train.SentencePieceOptions(
            model_type=args.model_type,
            vocab_size=args.vocab_size,
            byte_fallback=args.byte_fallback,
            character_coverage=args.character_coverage,
            split_digits=args.split_digits,
            normalization=args.normalization,
            user_defined_symbols=args.special_tokens,
            input_sentence_size=args.input_sentence_size,
            threads=args.workers,
        )
        path = train.train_sentencepiece(corpus, args.output, options)
    left_out = f", {corpus.left_out} left out" if corpus.left_out else ""
    entries = build_tokenizer(kind, path).vocab_size
    print(f"{path}: {entries:,} entries, trained on {corpus.documents:,} documents{left_out}")
    if entries < args.vocab_size:
        print(f"the text has no more than that; --vocab-size {args.vocab_size} needs more of it")
    if passed_over:
        print(f"files passed over: {told(passed_over)}")
    print(f"--tokenizer-type {kind} --tokenizer-model {path}")
