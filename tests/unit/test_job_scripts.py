"""The job scripts: starting a node's ranks, and the decision about a job whose ranks have ended."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mesh_megatron.training.fault_tolerance.run_status import RunStatus, write_status

ROOT = Path(__file__).parents[2]
VARIABLES = {
    "examples/slurm/node.sh": {
        **{"SLURM_NODEID": "0", "SLURM_NNODES": "2", "SLURM_JOB_ID": "12", "SLURMD_NODENAME": "node1"},
        **{"SLURM_CPUS_ON_NODE": "2", "HEAD": "node1", "HEAD_PORT": "29500", "LOGS": "/nowhere"},
    },
    "examples/multinode/pretrain.sh": {"NODES": "2", "HEAD": "node1:29500"},
}


def started(script, folder, **variables):
    """Return the launcher's flags and the folders of compiled kernels."""
    python = folder / "python"
    python.write_text('#!/bin/sh\necho "$*"\necho "$TRITON_CACHE_DIR $TORCHINDUCTOR_CACHE_DIR"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(python), **VARIABLES[script], **variables}
    command, caches = subprocess.run(
        [ROOT / script], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return command, caches.split()


@pytest.mark.parametrize("script", VARIABLES)
def test_compiled_kernels_are_on_the_nodes_own_disk(script, tmp_path):
    _, caches = started(script, tmp_path, HOME=str(tmp_path))
    assert len(set(caches)) == 2 and all(cache.startswith("/tmp/t") and str(os.getuid()) in cache for cache in caches)
    theirs = {"TRITON_CACHE_DIR": "/scratch/one", "TORCHINDUCTOR_CACHE_DIR": "/scratch/two"}
    assert started(script, tmp_path, **theirs)[1] == list(theirs.values())


def test_torchrun_starts_ranks_again(tmp_path):
    assert "--max-restarts 3 " in started("examples/slurm/node.sh", tmp_path)[0]
    assert "--max-restarts 0 " in started("examples/slurm/node.sh", tmp_path, MAX_RESTARTS="0")[0]


STOPPED, FAILED = RunStatus(status="stopped early"), RunStatus(status="failed", exit_code=1)
REFUSED, WRONG = RunStatus(status="failed", exit_code=2), RunStatus(status="failed", exit_code=3)


@pytest.mark.parametrize(
    ("before", "newest", "code", "status", "warned", "said"),
    [
        (10, 20, 0, STOPPED, "yes", "Back into the queue, to continue from iteration 20."),
        (50, 45, 0, STOPPED, "yes", "Back into the queue, to continue from iteration 45."),  # it went back to 40
        (10, 10, 0, STOPPED, "yes", "stopped before a step was made"),
        (10, 20, 1, REFUSED, "", "Back into the queue"),  # started again by torchrun on a node that had lost a GPU
        (10, 10, 1, REFUSED, "", "refused"),
        (10, 20, 1, WRONG, "", "its numbers went wrong"),
        (10, 10, 1, FAILED, "", "Back into the queue"),
    ],
)
def test_jobs_that_are_queued_again(before, newest, code, status, warned, said, tmp_path):
    write_status(tmp_path, status)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(f"{newest}\n")
    assert said in concluded(tmp_path, before=before, code=code, warned=warned)


@pytest.mark.parametrize("living", [True, False])
def test_a_folder_of_another_run(living, tmp_path):
    """One that was killed long ago has no part in why this job failed."""
    write_status(tmp_path, FAILED)
    owner = tmp_path / "owner.json"
    owner.write_text(json.dumps({"job": "11"}))
    if not living:
        os.utime(owner, (0, 0))
    assert ("is in use by another run" if living else "Back into the queue") in concluded(tmp_path, before=0, code=1)


def concluded(save, *, before, code, warned=""):
    """Return the output of job.sh for job 12, whose ranks have ended with ``code``."""
    logs = save / "logs"
    logs.mkdir()
    os.utime(logs, (1, 1))  # before anything that is written now
    variables = {"SAVE": save, "LOGS": logs, "SLURM_JOB_ID": 12, "tries": logs / "tries", "PYTHON": sys.executable}
    variables |= {"before": before, "code": code, "warned": warned, "cancelled": ""}
    script = "scontrol() { :; }; source examples/slurm/job.sh; conclude"
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=os.environ | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ).stdout  # fmt: skip


@pytest.mark.parametrize("script", sorted(path.relative_to(ROOT) for path in ROOT.glob("[!.]*/**/*.sh")), ids=str)
def test_scripts_are_bash(script):
    """Parse every script, also those that need a GPU or a cluster to run."""
    parsed = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr


PYTHON_OF_A_GPU = """#!/bin/bash
echo "$PYTHONPATH" "$@" >>"$CALLS"
case "$*" in
  *gpu_gate.py) exit "$GATE" ;;
  pretrain_mesh.py*) all="$*"; save=${all#*--save }; save=${save%% *}
    mkdir -p "$save/profile" && echo {} >"$save/profile/rank0.json" && echo {} >"$save/metrics.jsonl" ;;
  *loss.py*) exit "${LOSS:-0}" ;;
esac
"""


def on_gpu(folder: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """Run benchmarks/on_gpu.sh with a Python that notes its calls; return the exit code, the summary and the calls."""
    python = folder / "python"
    python.write_text(PYTHON_OF_A_GPU)
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "CALLS": str(folder / "calls"), **variables}
    command = ["bash", ROOT / "benchmarks/on_gpu.sh", folder / "results", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    summary = folder / "results/summary.txt"
    return done.returncode, summary.read_text() if summary.exists() else "", (folder / "calls").read_text()


def test_on_gpu_runs_every_step(tmp_path):
    code, summary, calls = on_gpu(tmp_path, "600", GATE="0")
    assert code == 0 and "Transformer Engine: yes" in summary
    assert summary.count("exit code 0") == 11 and "left out" not in summary
    assert "benchmarks/fp8.py" in calls and "not transformer_engine" not in calls
    assert (tmp_path / "results/trace.json.gz").exists()


def test_on_gpu_without_transformer_engine(tmp_path):
    code, summary, calls = on_gpu(tmp_path, "600", GATE="1")
    assert code == 0 and "Transformer Engine: no, the layers are those of torch" in summary
    assert summary.count("exit code 0") == 9 and "benchmarks/fp8.py" not in calls
    (tests,) = (line for line in calls.splitlines() if "test_on_gpu.py" in line)
    assert "not transformer_engine and not fp8" in tests


def test_on_gpu_names_what_failed_and_what_it_left_out(tmp_path):
    code, summary, _ = on_gpu(tmp_path, "40", "loss", "recurrence-k8", GATE="0", LOSS="3")
    assert code == 1 and "loss: exit code 3" in summary and "recurrence-k8: left out" in summary
    assert on_gpu(tmp_path, "600", GATE="9")[0] == 2
