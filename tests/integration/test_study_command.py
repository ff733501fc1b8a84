"""A study from the command line, with two models that are too small for meaningful losses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
GRID = {
    "corpus": {"sources": [str(Path(json.__file__).parent)], "vocabulary": 384},
    "settings": {
        "model": {"layout": "1+1R2+1", "seq_length": 16, "hidden_size": 16, "num_attention_heads": 1},
        "training": {"train_iters": 4, "micro_batch_size": 2, "eval_interval": 2, "eval_iters": 1},
        "data": {"split": "60,40,0", "num_workers": 0},
        "checkpoint": {"save_interval": 2},
    },
    "setups": {"d16": None},
    "schemes": {"base": {"model": {"recurrence": "base"}}, "mesh": {"model": {"recurrence": "mesh"}}},
    "parts": [{"setups": ["d16"], "schemes": ["base", "mesh"], "seeds": [1]}],
}


def study(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.study", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_study_trains_reports_and_goes_on(tmp_path: Path) -> None:
    grid, output = tmp_path / "micro.yaml", tmp_path / "out"
    grid.write_text(yaml.safe_dump(GRID))
    first = study(grid, "--output", output, "--workers", 2)
    assert first.returncode == 0, first.stderr
    record = json.loads((output / "study_micro.json").read_text())
    assert [(cell["scheme"], len(cell["validation"])) for cell in record["cells"]] == [("base", 2), ("mesh", 2)]
    assert all(4 < cell["loss"] < 8 for cell in record["cells"])  # about ln 384
    assert {path.name for path in output.glob("*.png")} == {"study_micro_curves.png", "study_micro_differences.png"}
    assert (output / "study_micro.md").read_text().strip() in first.stdout

    # as if mesh had been killed after its checkpoint of step 2
    base, mesh = (output / "d16" / scheme / "seed1" for scheme in ("base", "mesh"))
    shutil.rmtree(mesh / "iter_0000004")
    (mesh / "latest_checkpointed_iteration.txt").write_text("2")
    lines = (mesh / "metrics.jsonl").read_text().splitlines()
    (mesh / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    halfway = study(grid, "--output", output, "--report-only")
    assert "Missing, 1 of 2 cells: d16/mesh seed 1 (2 of 4 steps)." in halfway.stdout
    before = (base / "log.txt").read_text()
    again = study(grid, "--output", output)
    assert again.returncode == 0, again.stderr
    assert (base / "log.txt").read_text() == before, "a completed cell was trained again"
    assert "at iteration 2" in (mesh / "log.txt").read_text()
    assert json.loads((output / "study_micro.json").read_text()) == record, "differs from the run without interruption"


def test_mistakes_end_before_anything_is_written(tmp_path: Path) -> None:
    done = study("medium", "--output", tmp_path / "out")
    assert done.returncode == 2 and "medium: no grid of that name" in done.stderr
    assert not (tmp_path / "out").exists()
