"""Small runs of the trainer: their flags, how they start under torchrun, what they logged."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]

SMALL = [
    *("--layout", "1+1R2+1", "--hidden-size", "32", "--num-attention-heads", "2", "--seq-length", "32"),
    *("--tokenizer-type", "ByteLevelTokenizer", "--num-workers", "0", "--split", "60,20,20"),
    *("--global-batch-size", "4", "--micro-batch-size", "2", "--lr", "3e-3", "--log-interval", "1"),
    *("--eval-interval", "100", "--eval-iters", "2"),
]


def small_corpus(folder: Path, copies: int = 3, tokenizer: str = "--tokenizer-type ByteLevelTokenizer") -> str:
    """Prefix of a .bin/.idx, made in ``folder``, of some standard-library source, by default as bytes."""
    text = folder / "text.jsonl"
    documents = [Path(module).read_text() for module in (json.__file__, json.decoder.__file__, subprocess.__file__)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents * copies))
    subprocess.run(
        [
            *(sys.executable, ROOT / "tools/preprocess_data.py", "--input", text, "--output-prefix", folder / "tokens"),
            *(*tokenizer.split(), "--append-eod", "--workers", "1", "--overwrite"),
        ],
        check=True,
        capture_output=True,
    )
    return str(folder / "tokens_text_document")


def losses(save: Path) -> dict[int, tuple]:
    """Iteration -> loss, gradient norm, learning rate of a run's metrics.jsonl, or its evaluation losses."""
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "grad-norm" in record]
    assert [record["iteration"] for record in steps] == list(range(1, len(steps) + 1)), "gaps or doubles"
    return {r["iteration"]: (r["lm loss"], r["grad-norm"], r["learning-rate"]) for r in steps}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, optimizer state included, whole."""
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(checkpoint)
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "size")
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def final(save: Path) -> Path:
    return save / f"iter_{int((save / 'latest_checkpointed_iteration.txt').read_text()):07d}"


TORCHRUN, LAUNCH = ["-m", "torch.distributed.run"], ["tools/launch.py"]


def torchrun(
    ranks: int, *command: object, launcher: Sequence[str] = TORCHRUN, **environment: str
) -> subprocess.CompletedProcess:
    """Start a script on ``ranks`` processes of this machine, with torchrun or another launcher."""
    return subprocess.run(
        [sys.executable, *launcher, "--standalone", "--nproc-per-node", str(ranks), *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
