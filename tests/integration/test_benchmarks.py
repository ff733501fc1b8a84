"""Benchmarks run as their documents say, at sizes too small to mean anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mesh_megatron.config.recurrence import SCHEMES

pytestmark = pytest.mark.full

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


def test_operations_add_up(tmp_path: Path) -> None:
    sizes = "--hidden-size 32 --num-attention-heads 2 --seq-length 16 --padded-vocab-size 128 --rounds 2"
    command = [sys.executable, str(ROOT / "benchmarks" / "operations.py"), *sizes.split()]
    subprocess.run([*command, "--json", str(tmp_path / "out.json")], check=True, cwd=ROOT, timeout=300)
    rows = json.loads((tmp_path / "out.json").read_text())["ms"]
    assert list(rows) == ["mesh", "base", "transformers"]
    for name, row in rows.items():
        assert sum(row.values()) == pytest.approx(2 * row["in all"]), name
        assert min(row[kind] for kind in ("matrix products", "attention", "GELU", "norms", "loss", "copies")) > 0, name


def test_recurrence_compares_schemes_and_memories(tmp_path: Path) -> None:
    sizes = "--hidden-size 32 --num-attention-heads 2 --seq-length 16 --padded-vocab-size 128 --loops 2 3 --rounds 1"
    command = [sys.executable, str(ROOT / "benchmarks" / "recurrence.py"), *sizes.split()]
    subprocess.run([*command, "--json", str(tmp_path / "out.json")], check=True, cwd=ROOT, timeout=300)
    record = json.loads((tmp_path / "out.json").read_text())
    schemes = {"base again", "vanilla", "mesh slots", "mesh torch", *SCHEMES} - {"mesh"}
    two, three = record["recurrence"]["2"], record["recurrence"]["3"]
    assert set(three) >= schemes and set(two) >= schemes | {f"mesh M={slots}" for slots in (3, 4, 5, 6)}
    for row in (*two.values(), *three.values()):
        assert row["ms"] > 0 and row["saved MB"] > 0
    assert two["base again"]["saved / base"] == two["base"]["saved / base"] == 1
    assert 1 < two["mesh torch"]["saved / base"] < two["mesh slots"]["saved / base"]
    assert record["operation"]["3"]["mesh torch"]["least MB"] > record["operation"]["2"]["mesh torch"]["least MB"]


def test_loss_compares_chunks(tmp_path: Path) -> None:
    sizes = "--tokens 64 --hidden-size 16 --padded-vocab-size 256 --chunks 8 64 --rounds 1"
    command = [sys.executable, str(ROOT / "benchmarks" / "loss.py"), *sizes.split()]
    subprocess.run([*command, "--json", str(tmp_path / "out.json")], check=True, cwd=ROOT, timeout=300)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert list(rows)[:4] == ["chunks 8", "chunks 64", "Megatron-Core", "torch"]
    assert 0 < rows["chunks 8"]["peak MB"] < rows["chunks 64"]["peak MB"]


def test_fp8_says_what_it_needs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "fp8.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 2 and "--fp8-format hybrid needs a GPU and there is none" in done.stderr
    sizes = "--layout 1+1R2+1 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --padded-vocab-size 256"
    small = [
        *command,
        *sizes.split(),
        "--steps",
        "6",
        "--turn",
        "2",
        "--json",
        str(tmp_path / "out.json"),
        "--bf16-only",
    ]
    subprocess.run(small, check=True, cwd=ROOT, timeout=300)
    record = json.loads((tmp_path / "out.json").read_text())
    assert len(record["losses"]["bf16"]) == 6 and record["losses"]["bf16"][-1] < record["losses"]["bf16"][0]
    assert record["rows"]["bf16"]["speed / bf16"] == 1


def test_serving_compares_a_looped_and_a_plain_model(tmp_path: Path) -> None:
    """In transformers; vLLM joins in a Python that has it."""
    sizes = "--hidden-size 32 --num-attention-heads 2 --vocab-size 128 --batches 1 2 --new-tokens 3 --rounds 1"
    command = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), *sizes.split()]
    subprocess.run([*command, "--json", str(tmp_path / "out.json")], check=True, cwd=ROOT, timeout=300)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert list(rows)[:2] == ["transformers, batch 1", "transformers, batch 2"]
    for row in rows.values():
        slower = row["plain tokens/s"] / row["looped tokens/s"]
        assert row["looped / plain"] * slower == pytest.approx(1)  # one round: medians are its numbers


def test_restart_time_adds_up(tmp_path: Path) -> None:
    sizes = "--hidden-size 32 --save-interval 4 --steps-after-save 2 --repetitions 1 --launchers launch"
    command = [sys.executable, str(ROOT / "benchmarks" / "restart_time.py"), *sizes.split()]
    subprocess.run([*command, "--json", str(tmp_path / "out.json")], check=True, cwd=ROOT, timeout=300)
    (kill,) = json.loads((tmp_path / "out.json").read_text())["kills"]["launch"]
    # A step or two may be logged between the order to kill and the death.
    assert kill.pop("steps lost") >= 2
    assert kill.pop("total") == pytest.approx(sum(kill.values()), abs=0.05) and min(kill.values()) >= 0
