"""Make a corpus for the demo from a folder of code or text, or from one text file: one line of JSON per file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from mesh_megatron.config.cli import parse

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
SUFFIXES = {".py", ".txt", ".md", ".rst"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Collect text files into one .jsonl."""

    source: tyro.conf.Positional[Path]
    """A text file, or a folder from which .py, .txt, .md and .rst files are read."""
    output: Path
    """The .jsonl to write."""


def main() -> None:
    args = parse(Arguments)
    if not args.source.exists():
        raise SystemExit(f"{args.source}: no such file or folder")
    files = [args.source] if args.source.is_file() else sorted(text_files(args.source))
    temporary = args.output.with_suffix(".tmp")
    documents = size = 0
    with temporary.open("w", encoding="utf-8") as out:
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # the standard library has test files that are not text
            if text.strip():
                out.write(json.dumps({"text": text}) + "\n")
                documents, size = documents + 1, size + len(text)
    if not documents:
        raise SystemExit(f"{args.source}: no text found ({', '.join(sorted(SUFFIXES))})")
    os.replace(temporary, args.output)
    print(f"{args.output}: {documents:,} documents, {size / 1e6:.1f} million characters")


def text_files(folder: Path) -> list[Path]:
    """Return the text files in ``folder`` and its subfolders, in no particular order."""
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(here, name) for name in names if Path(name).suffix in SUFFIXES]
    return found


if __name__ == "__main__":
    main()
