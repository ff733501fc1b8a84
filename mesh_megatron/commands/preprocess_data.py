"""Tokenize text into Megatron's .bin/.idx, from files, globs, folders or standard input. See docs/data.md."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from mesh_megatron.config.bounds import Bounds, Count
from mesh_megatron.config.megatron_flags import flags_with_values
from mesh_megatron.config.tokenizer import TokenizerConfig, TokenizerType
from mesh_megatron.util.cores import cores


@dataclass(frozen=True, kw_only=True)
class Arguments(TokenizerConfig):
    """Tokenize documents into OUTPUT_PREFIX_KEY_document.bin and .idx, byte for byte as Megatron-LM does."""

    input: tuple[str, ...]
    """Files, globs and folders: .jsonl, .ndjson, .json, .txt, .parquet, each plain or .gz, .zst, .bz2, .xz; folders
    that Hugging Face datasets saved; - reads standard input."""
    output_prefix: str
    """Prefix to write; _KEY_document and a suffix are appended."""
    tokenizer_type: TokenizerType = field()
    """Type of tokenizer."""
    append_eod: bool = False
    """Append the tokenizer's end-of-document token to every document."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys (columns) to read from each record; each gets its own output."""
    document_separator: str = "blank-line"
    """Separator of documents in a text file: blank-line, line, file (a file is one document), or a text such as
    '<|endoftext|>'."""
    text_suffixes: tuple[str, ...] = ()
    """Additional suffixes of files to read as text, such as .py .md."""
    stdin_format: Literal["jsonl", "text"] = "jsonl"
    """Format of standard input."""
    max_document_bytes: Count = 64 << 20
    """Largest size of a line or document, which bounds memory; a longer one is an error."""
    on_error: Literal["stop", "skip"] = "stop"
    """Action for a document that cannot be used: stop and report file and line, or skip and count it."""

    workers: Count = cores()
    """Number of worker processes."""
    tokenizer_backend: Literal["auto", "gigatoken", "vendor"] = "auto"
    """Tokenizing library: auto takes gigatoken where it is proven to give the same ids, and else the vendor's."""
    tokenizer_cache_mb: Annotated[int, Bounds(least=0)] = 1024
    """Memory limit in MB of gigatoken's word cache, per worker."""
    resume: bool = False
    """Continue where an interrupted run over the same input stopped; finished output is left unchanged."""
    overwrite: bool = False
    """Replace existing output."""
    progress: bool = True
    """Show progress, rate and time left."""


# Flags of Megatron-LM's preprocess_data.py that ask for what always holds here, or need --split-sentences.
WITHOUT_EFFECT = ("--partitions", "--keep-sequential-samples", "--log-interval", "--keep-newlines", "--lang")
_CORES = "not needed here: --workers is the number of cores by default"
REFUSED = {
    "--split-sentences": "texts are not cut into sentences here: put a list of sentences under the key, which becomes "
    "one document of several sequences",
    "--find-optimal-num-workers": _CORES,
    "--workers-to-check": _CORES,
    "--max-documents": _CORES,
}


def without_flags_of_megatron(words: Sequence[str]) -> list[str]:
    """Return a command line without the flags of Megatron-LM that have no effect; ``ValueError`` for a refused one."""
    kept: list[str] = []
    for flag, values in flags_with_values(words):
        name = flag.replace("_", "-")
        if name in REFUSED:
            raise ValueError(f"{name}: {REFUSED[name]}")
        kept += [] if name in WITHOUT_EFFECT else [flag, *values]
    return kept


def main() -> int:
    from mesh_megatron.config.cli import parse, print_error, run

    try:
        words = without_flags_of_megatron(sys.argv[1:])
    except ValueError as error:
        print_error(error)
        return 2
    args = parse(Arguments, words, description=__doc__)
    refusals = (ValueError, OSError, RuntimeError)
    interrupted = "interrupted; run the same command with --resume to continue"
    return run(lambda: preprocess_all(args), refusals, interrupted)


def preprocess_all(args: Arguments) -> None:
    """Write the datasets and print what they hold, what was left out, and how to train with them."""
    from mesh_megatron.data.preprocessing.preprocess import PreprocessOptions, preprocess
    from mesh_megatron.data.preprocessing.readers import SplitOptions
    from mesh_megatron.data.preprocessing.sources import list_sources, told

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
    split_options = SplitOptions(args.document_separator, args.json_keys, args.max_document_bytes)
    passed_over: Counter[str] = Counter()
    sources = list_sources(
        args.input, text_suffixes=args.text_suffixes, stdin_format=args.stdin_format, passed_over=passed_over
    )
    summary = preprocess(sources, args.output_prefix, args.tokenizer(), split_options, options)
    print(replace(summary, passed_over=told(passed_over)))
