"""Tokenize text into Megatron's .bin/.idx, from files, globs, folders or standard input. See docs/data.md."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from mesh_megatron.config.bounds import Bounds, Count
from mesh_megatron.config.tokenizer import TokenizerConfig, TokenizerType
from mesh_megatron.util.cores import cores


@dataclass(frozen=True, kw_only=True)
class Arguments(TokenizerConfig):
    """Tokenize documents into OUTPUT_PREFIX_KEY_document.bin and .idx, byte for byte as Megatron-LM does."""

    input: tuple[str, ...]
    """Files, globs and folders: .jsonl, .ndjson, .json, .txt, .parquet, each plain or .gz, .zst, .bz2, .xz; folders
    that Hugging Face datasets saved; - for standard input."""
    output_prefix: str
    """Prefix to write; _KEY_document and a suffix are appended."""
    tokenizer_type: TokenizerType = field()
    """Kind of tokenizer."""
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
    from mesh_megatron.data.preprocessing.preprocess import PreprocessOptions, preprocess
    from mesh_megatron.data.preprocessing.readers import SplitOptions
    from mesh_megatron.data.preprocessing.sources import list_sources, told

    args = parse(Arguments, description=__doc__)
    options = PreprocessOptions(
        append_eod=args.append_eod,
        workers=args.workers,
        backend=args.tokenizer_backend,
        cache_bytes=args.tokenizer_cache_mb << 20,
        on_error=args.on_error,
        resume=args.resume,
        overwrite=args.overwrite,
        show_progress=args.progress,
    )
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
            args.tokenizer(),
            SplitOptions(args.document_separator, args.json_keys, args.max_document_bytes),
            options,
        )
    except (ValueError, OSError, RuntimeError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print_error("interrupted; the same command with --resume goes on from here")
        return 130
    print(replace(summary, passed_over=told(passed_over)))
    return 0
