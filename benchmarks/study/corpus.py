"""Text to tokens for a study, with the project's own tools; what is there already is kept."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.grid import Corpus

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Tokens:
    """A preprocessed corpus."""

    prefix: Path
    tokenizer: Path

    @property
    def flags(self) -> list[str]:
        """Flags of ``pretrain_mesh.py``."""
        tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(self.tokenizer)]
        return ["--data-path", str(self.prefix), *tokenizer]


def prepare(corpus: Corpus, folder: Path) -> Tokens:
    """Collect text, train the tokenizer, write tokens under ``folder``; ``CalledProcessError`` where a tool fails."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sysconfig.get_path_names()
    sources = [sysconfig.get_paths()[name] if name in names else name for name in corpus.sources]
    texts = [folder / f"text{number}.jsonl" for number in range(len(sources))]
    for source, text in zip(sources, texts, strict=True):
        _make(text, "examples/make_corpus.py", source, "--output", text)
    tokenizer, prefix = folder / "tokenizer.model", folder / "tokens"
    _make(
        tokenizer, "tools/train_tokenizer.py", "--input", *texts, "--model-type", "bpe", "--byte-fallback",
        "--vocab-size", corpus.vocabulary, "--output", tokenizer.with_suffix(""),
    )  # fmt: skip
    _make(
        folder / "tokens_text_document.idx", "tools/preprocess_data.py", "--input", *texts, "--output-prefix", prefix,
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer, "--append-eod", "--workers", 2,
    )  # fmt: skip
    return Tokens(folder / "tokens_text_document", tokenizer)


def _make(target: Path, tool: str, *arguments: object) -> None:
    if not target.exists():
        subprocess.run([sys.executable, str(ROOT / tool), *map(str, arguments)], check=True, cwd=ROOT)
