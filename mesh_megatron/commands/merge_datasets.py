"""Join several .bin/.idx pairs into one. See docs/data.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Join indexed datasets into one, document by document, in the given order."""

    input: tuple[str, ...]
    """Prefixes of .bin/.idx pairs, or folders of them, whose pairs are read in the order of their names."""
    output_prefix: str
    """Prefix of the .bin/.idx pair to write."""
    resume: bool = False
    """Continue where an interrupted run stopped; finished output is left unchanged."""
    overwrite: bool = False
    """Replace existing output."""


def main() -> int:
    from mesh_megatron.config.cli import parse, run

    args = parse(Arguments, description=__doc__)
    return run(lambda: merge_all(args), interrupted="interrupted; run the same command with --resume to continue")


def merge_all(args: Arguments) -> None:
    """Merge the datasets and print the size of the result."""
    from mesh_megatron.data.indexed import read_indexed
    from mesh_megatron.data.preprocessing.merge import list_prefixes, merge

    prefixes = list_prefixes(args.input)
    merge(prefixes, args.output_prefix, resume=args.resume, overwrite=args.overwrite)
    merged = read_indexed(args.output_prefix)
    print(f"{len(prefixes)} datasets: {merged.documents:,} documents, {len(merged.tokens):,} tokens")
    print(f"--data-path {args.output_prefix}")
