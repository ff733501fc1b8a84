"""How a node's share of a job starts its ranks."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VARIABLES = {
    "examples/slurm/node.sh": {
        **{"SLURM_NODEID": "0", "SLURM_NNODES": "2", "SLURM_JOB_ID": "12", "SLURMD_NODENAME": "node1"},
        **{"SLURM_CPUS_ON_NODE": "2", "HEAD": "node1", "HEAD_PORT": "29500", "LOGS": "/nowhere"},
    },
    "examples/multinode/pretrain.sh": {"NODES": "2", "HEAD": "node1:29500"},
}


def started(script, folder, **variables):
    """What the launcher is started with: its flags, and the folders of compiled kernels."""
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
