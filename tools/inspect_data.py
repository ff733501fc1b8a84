"""Look into .bin/.idx pairs and verify that they are whole. See docs/data.md."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from mesh_megatron.config.bounds import Bounds, Count
from mesh_megatron.config.data import TokenizerType
from mesh_megatron.training.durable import ready_file, write_durably


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Counts, lengths, frequent tokens, checksum and samples of indexed datasets; fails if one is damaged."""

    input: tuple[str, ...]
    """Prefixes of .bin/.idx pairs, or folders of them."""
    tokenizer_type: TokenizerType | None = None
    """Decode samples with this tokenizer; without one they are shown as ids."""
    tokenizer_model: Path | None = None
    """Its model, as for preprocess_data.py."""
    vocab_size: Count | None = None
    """Vocabulary of NullTokenizer or TikTokenizer."""
    frequent: Annotated[int, Bounds(least=0)] = 10
    """How many of the most frequent tokens to show."""
    samples: Annotated[int, Bounds(least=0)] = 3
    """How many documents to show, spread over the file."""
    sample_tokens: Count = 64
    """How much of each."""
    json: Path | None = None
    """Also write everything to this file."""


def main() -> int:
    from mesh_megatron.config.cli import parse
    from mesh_megatron.data.inspection import inspect, report
    from mesh_megatron.data.merge import list_prefixes
    from mesh_megatron.data.tokenizers import build_tokenizer

    args = parse(Arguments, description=__doc__)
    found = []
    try:
        if args.json:
            ready_file(args.json, "--json")
        tokenizer = None
        if args.tokenizer_type:
            tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, vocab_size=args.vocab_size)
        for prefix in list_prefixes(args.input):
            found.append(
                inspect(
                    prefix, tokenizer, frequent=args.frequent, samples=args.samples, sample_tokens=args.sample_tokens
                )
            )
            print(report(found[-1], tokenizer))
        if args.json:
            write_durably(args.json, json.dumps([asdict(item) for item in found], indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"inspect_data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
