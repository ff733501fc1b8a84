"""Two machines, played by two launchers that meet over loopback: examples/multinode/pretrain.sh as users start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import BASE, PP2
from rank_pool import ROOT, free_port

from mesh_megatron.checkpoint.metrics_file import read_metrics

pytestmark = pytest.mark.full

FLAGS = [*BASE.split(), "--train-iters", "10", "--log-interval", "1", "--eval-interval", "10"]
LAYOUTS = {"pp2": PP2.split(), "dp2": []}


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Return the records of one process and of both layouts on two "machines"; all run at the same time."""
    folder = tmp_path_factory.mktemp("multinode")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "NODES": "2",
        "RANKS_PER_NODE": "1",
        "LOCAL_ADDRESS": "127.0.0.1",
    }
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    jobs = [("one", [sys.executable, "pretrain_mesh.py"], environment, [])]
    for name, flags in LAYOUTS.items():
        meeting = environment | {"HEAD": f"127.0.0.1:{free_port()}", "JOB": name}
        jobs += [(name, ["examples/multinode/pretrain.sh"], meeting, flags)] * 2
    running = []
    for name, command, variables, flags in jobs:
        command = [*command, *FLAGS, *flags, "--save", str(folder / name)]
        running.append(
            subprocess.Popen(
                command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    try:
        for process in running:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output[-5000:]
    finally:
        for process in running:
            process.kill()
    return {name: read_metrics(folder / name / "metrics.jsonl") for name in ("one", *LAYOUTS)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_machines_train_what_one_process_trains(layout: str, metrics: dict[str, list[dict]]) -> None:
    for quantity in ("lm loss", "lm loss validation"):
        expected = [record[quantity] for record in metrics["one"] if quantity in record]
        actual = [record[quantity] for record in metrics[layout] if quantity in record]
        assert len(expected) >= (10 if quantity == "lm loss" else 1)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_the_script_says_what_is_missing() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("NODES", "HEAD")}
    result = subprocess.run(
        ["examples/multinode/pretrain.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "set NODES" in result.stderr
