"""Benchmarks run as their documents say, at sizes too small to mean anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_end_to_end_compares_four_models(tmp_path: Path) -> None:
    sizes = "--hidden-size 32 --num-attention-heads 2 --seq-length 16 --padded-vocab-size 128 --matrix-size 64"
    command = [sys.executable, str(ROOT / "benchmarks" / "end_to_end.py"), *sizes.split(), "--rounds", "3"]
    subprocess.run([*command, "--json", str(tmp_path / "out.json")], check=True, cwd=ROOT, timeout=300)
    record = json.loads((tmp_path / "out.json").read_text())
    assert list(record["rows"]) == ["mesh", "base", "GPTModel", "transformers"]
    for name, row in record["rows"].items():
        assert row["tokens/s"] > 0 and 0 < row["share of peak"] < 1, name
        assert name == "mesh" or row[f"/ {name}"] == 1


def test_loss_compares_chunks(tmp_path: Path) -> None:
    sizes = "--tokens 64 --hidden-size 16 --padded-vocab-size 256 --chunks 8 64 --rounds 1"
    command = [sys.executable, str(ROOT / "benchmarks" / "loss.py"), *sizes.split()]
    subprocess.run([*command, "--json", str(tmp_path / "out.json")], check=True, cwd=ROOT, timeout=300)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert list(rows)[:4] == ["chunks 8", "chunks 64", "Megatron-Core", "torch"]
    assert 0 < rows["chunks 8"]["peak MB"] < rows["chunks 64"]["peak MB"]


def test_fp8_says_what_it_needs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "fp8.py")]
    if not torch.cuda.is_available():
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 2 and "--fp8-format hybrid needs a GPU and there is none" in done.stderr
    sizes = "--layout 1+1R2+1 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --padded-vocab-size 256"
    small = [*command, *sizes.split(), "--steps", "6", "--turn", "2", "--json", str(tmp_path / "out.json"), "--recipes"]
    subprocess.run(small, check=True, cwd=ROOT, timeout=300)
    record = json.loads((tmp_path / "out.json").read_text())
    assert len(record["losses"]["bf16"]) == 6 and record["losses"]["bf16"][-1] < record["losses"]["bf16"][0]
    assert record["rows"]["bf16"]["speed / bf16"] == 1
