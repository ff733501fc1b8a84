"""The commands of README.md on one's own text, run as they stand there but for fewer steps and smaller batches."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from integration_runs import ROOT, losses
from transformers import AutoModelForCausalLM

from mesh_megatron.config.data import DataConfig
from mesh_megatron.data.datasets import SampleCounts, build_datasets

STEPS, SAMPLES, SEQUENCE, SEED, VOCABULARY = 6, 4, 256, 1234, 384
FEWER = (
    f"--train-iters {STEPS} --lr-warmup-iters 1 --micro-batch-size 2 --global-batch-size {SAMPLES} --eval-iters 1 "
    "--log-interval 1"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands were run: with texts, a run and the model exported from it."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("tools", "examples", "pretrain_mesh.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "code.txt").write_text(Path(subprocess.__file__).read_text())
    (commands,) = re.findall(r"```bash\nmake env && source .venv/bin/activate\n(.*?)```", readme(), flags=re.DOTALL)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    shortened = commands.replace("--save runs/mine", f"--save runs/mine {FEWER}")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shortened], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-9000:]}"
    return folder


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_run_learns(folder: Path) -> None:
    steps = losses(folder / "runs/mine")
    assert len(steps) == STEPS and steps[STEPS][0] < steps[1][0]


@torch.no_grad()
def test_the_exported_model_has_the_runs_validation_loss(folder: Path) -> None:
    records = [json.loads(line) for line in (folder / "runs/mine/metrics.jsonl").read_text().splitlines()]
    (expected,) = [record["lm loss validation"] for record in records if "lm loss validation" in record]
    data = DataConfig(data_path=(str(folder / "my_text_document"),))
    counts = SampleCounts(train=STEPS * SAMPLES, valid=SAMPLES, test=SAMPLES)
    sets = build_datasets(data, counts, seq_length=SEQUENCE, seed=SEED, tokenizer=None, vocab_size=VOCABULARY)
    samples = sets.valid["validation"]
    batch = [samples[number] for number in range(SAMPLES)]
    model = AutoModelForCausalLM.from_pretrained(folder / "exports/mine", trust_remote_code=True)
    logits = model(torch.stack([sample["tokens"] for sample in batch])).logits
    labels = torch.stack([sample["labels"] for sample in batch])
    assert torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels).item() == pytest.approx(expected, abs=1e-5)
