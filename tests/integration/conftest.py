"""A small real corpus, and runs of the trainer in this process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from integration_runs import ROOT, SMALL


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """Prefix of a .bin/.idx of some standard-library source as bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text.jsonl"
    documents = [Path(module).read_text() for module in (json.__file__, json.decoder.__file__, subprocess.__file__)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents * 3))
    subprocess.run(
        [
            *(sys.executable, ROOT / "tools/preprocess_data.py", "--input", text, "--output-prefix", folder / "tokens"),
            *("--tokenizer-type", "ByteLevelTokenizer", "--append-eod", "--workers", "1"),
        ],
        check=True,
        capture_output=True,
    )
    return str(folder / "tokens_text_document")


@pytest.fixture
def train(corpus, capsys):
    """Run pretrain_mesh.py's main in this process: (flags) -> (exit code, standard output, standard error)."""
    import pretrain_mesh

    def run(*flags: object, data: str = corpus) -> tuple[int, str, str]:
        code = pretrain_mesh.main([*SMALL, *("--data-path", data), *map(str, flags)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
