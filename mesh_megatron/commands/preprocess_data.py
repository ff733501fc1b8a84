"""Tokenize text into Megatron's .bin/.idx, from files, globs, folders or standard input. See docs/data.md."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from mesh_megatron.config.bounds import Bounds, Count
from mesh_megatron.config.data import TokenizerType
from mesh_megatron.util.cores import cores


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tokenize documents into OUTPUT_PREFIX_KEY_document.bin and .idx, byte for byte as Megatron-LM does."""

    input: tuple[str, ...]
    """Files, globs and folders: .jsonl, .ndjson, .json, .txt, .parquet, each plain or .gz, .zst, .bz2, .xz; folders
    that Hugging Face datasets saved; - for standard input."""
    output_prefix: str
    """Prefix to write; _KEY_document and a suffix are appended."""
    tokenizer_type: TokenizerType
    """Kind of tokenizer."""
    tokenizer_model: Path | None = None
    """SentencePiece .model, Hugging Face tokenizer.json or folder, or tiktoken file."""
    vocab_size: Count | None = None
    """Vocabulary of NullTokenizer (text that is ids already), or of TikTokenizer."""
    tokenizer_hf_no_include_special_tokens: bool = False
    """Do not let a Hugging Face tokenizer add its own special tokens (such as <s>) to a document."""
    tiktoken_pattern: str = "v2"
    """How tiktoken splits text: v1 or v2 (Megatron's), or gpt2, cl100k or o200k."""
    tiktoken_num_special_tokens: Annotated[int, Bounds(least=0)] = 1000
    """Ids that Megatron's .json tiktoken vocabularies leave for special tokens."""
    append_eod: bool = False
    """End every document with the tokenizer's end of document."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys (columns) to take from each record; one output for each."""
    document_separator: str = "blank-line"
    """What ends a document in a text file: blank-line, line, file (one file, one document), or a text such as
    '<|endoftext|>'."""
    text_suffixes: tuple[str, ...] = ()
    """More suffixes that are read as text, such as .py .md."""
    stdin_format: Literal["jsonl", "text"] = "jsonl"
    """What comes through standard input."""
    max_document_bytes: Count = 64 << 20
    """A longer line or document is an error; bounds memory."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a document that cannot be used: stop with file and line, or leave it out and count."""

    workers: Count = cores()
    """Worker processes."""
    tokenizer_backend: Literal["auto", "gigatoken", "vendor"] = "auto"
    """Library that tokenizes: gigatoken each document on which it is proven to give the same ids, else the vendor's."""
    tokenizer_cache_mb: Annotated[int, Bounds(least=0)] = 1024
    """Memory limit in MB of gigatoken's word cache, per worker."""
    resume: bool = False
    """Continue where an interrupted run over the same input stopped; finished output is left unchanged."""
    overwrite: bool = False
    """Replace existing output."""
    progress: bool = True
    """Show progress, rate and time left."""


def main() -> int:
    from mesh_megatron.config.cli import parse, print_error
    from mesh_megatron.data.preprocessing.preprocess import preprocess
    from mesh_megatron.data.preprocessing.readers import SplitOptions
    from mesh_megatron.data.preprocessing.sources import list_sources, told

    args = parse(Arguments, description=__doc__)
    tokenizer = {
        "tokenizer_type": args.tokenizer_type,
        "tokenizer_model": args.tokenizer_model,
        "vocab_size": args.vocab_size,
        "include_special_tokens": not args.tokenizer_hf_no_include_special_tokens,
        "tiktoken_pattern": args.tiktoken_pattern,
        "tiktoken_num_special_tokens": args.tiktoken_num_special_tokens,
    }
    passed_over: Counter[str] = Counter()
    try:
        summary = preprocess(
            list_sources(
                args.input,
                text_suffixes=args.text_suffixes,
                stdin_format=args.stdin_format,
                passed_over=passed_over,
            ),
            args.output_prefix,
            tokenizer,
            SplitOptions(args.document_separator, args.json_keys, args.max_document_bytes),
            append_eod=args.append_eod,
            workers=args.workers,
            backend=args.tokenizer_backend,
            cache_bytes=args.tokenizer_cache_mb << 20,
            on_error=args.on_error,
            resume=args.resume,
            overwrite=args.overwrite,
            show_progress=args.progress,
        )
    except (ValueError, OSError, RuntimeError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print_error("interrupted; the same command with --resume goes on from here")
        return 130
    print(replace(summary, passed_over=told(passed_over)))
    return 0
