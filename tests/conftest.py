"""What must be settled before the first test module is imported, and a small real corpus."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides once, when it is first imported, whether its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

# Some test modules import megatron.core as they are collected, and the CPU platform must come before it.
from mesh_megatron.platform import device  # noqa: E402

device.prepare()

ROOT = Path(__file__).parents[1]


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
