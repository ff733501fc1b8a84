"""Inspect .bin/.idx pairs and verify that they are intact. See docs/data.md."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mesh_megatron.config.bounds import Bounds, Count
from mesh_megatron.config.cli import parse, print_error, run
from mesh_megatron.config.tokenizer import TokenizerConfig
from mesh_megatron.util.atomic_files import prepare_file, write_atomically

if TYPE_CHECKING:
    from mesh_megatron.data.tokenizers.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Arguments(TokenizerConfig):
    """Show counts, lengths, frequent tokens, checksum and samples of indexed datasets; fail if any is damaged.

    Samples are decoded with --tokenizer-type; without it they are shown as ids.
    """

    input: tuple[str, ...]
    """Prefixes of .bin/.idx pairs, or folders of them."""
    frequent: Annotated[int, Bounds(least=0)] = 10
    """Number of most frequent tokens to show."""
    samples: Annotated[int, Bounds(least=0)] = 3
    """Number of documents to show, spread over the file."""
    sample_tokens: Count = 64
    """Number of tokens to show of each document."""
    json: Path | None = None
    """Also write everything to this file."""


def inspect_all(prefixes: list[str], tokenizer: Tokenizer | None, args: Arguments) -> list[dict[str, Any]]:
    """Print and return the contents of each pair, or the error of a damaged one."""
    from mesh_megatron.data.inspection import inspect, report

    shown = {"frequent": args.frequent, "samples": args.samples, "sample_tokens": args.sample_tokens}
    found: list[dict[str, Any]] = []
    for prefix in prefixes:
        try:
            pair = inspect(prefix, tokenizer, **shown)
            text = report(pair, tokenizer)
        except (ValueError, OSError) as error:
            print_error(error)
            found.append({"prefix": prefix, "error": str(error)})
            continue
        found.append(asdict(pair))
        print(text, flush=True)  # outside: output that cannot be written is no fault of the pair
    return found


def main() -> int:
    args = parse(Arguments, description=__doc__)
    return run(lambda: report_all(args))


def report_all(args: Arguments) -> int:
    """Inspect all pairs; return exit code 2 if any of them is damaged."""
    from mesh_megatron.data.preprocessing.merge import list_prefixes
    from mesh_megatron.data.tokenizers import from_config

    if args.json:
        prepare_file(args.json, "--json")
    found = inspect_all(list_prefixes(args.input), from_config(args), args)
    if args.json:
        write_atomically(args.json, json.dumps(found, indent=1) + "\n")
    wrong = sum("error" in pair for pair in found)
    if wrong:
        print_error(f"{wrong} of {len(found)} pairs are wrong")
    return 2 if wrong else 0
