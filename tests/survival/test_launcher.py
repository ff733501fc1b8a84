"""torchrun and its ranks: a refusal is told once and last, and no rank outlives its launcher."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from integration_runs import LAUNCH, ROOT, SMALL, TORCHRUN, losses, torchrun


@pytest.mark.parametrize(
    ("launcher", "flags", "message"),
    [
        (TORCHRUN, ["--lr", "-3"], "error: --lr -3.0: must be above 0"),
        (TORCHRUN, ["--hiden-size", "3"], "error: --hiden-size: no such flag; did you mean --hidden-size?"),
        pytest.param(LAUNCH, ["--lr", "-3"], "error: --lr -3.0: must be above 0", marks=pytest.mark.full),
    ],
)
def test_a_refusal_is_told_once_and_last(launcher, flags, message):
    command = ["pretrain_mesh.py", "--mock-data", "--train-iters", 1, "--padded-vocab-size", 64, *flags]
    done = torchrun(2, *command, launcher=launcher)
    assert done.returncode != 0
    assert done.stderr.count(message) == 1 and message not in done.stdout
    assert done.stderr.index(message) > done.stderr.index("ChildFailedError")  # nothing of torchrun's comes after it


@pytest.mark.full
@pytest.mark.parametrize("launcher", [TORCHRUN, LAUNCH], ids=["torchrun", "launch"])
def test_ranks_end_with_their_launcher(launcher, corpus, tmp_path):
    flags = [*SMALL, "--data-path", corpus, "--train-iters", "100000", "--save", str(tmp_path), "--num-workers", "1"]
    process = subprocess.Popen(
        [*(sys.executable, *launcher, "--standalone", "--nproc-per-node", "2"),
         "pretrain_mesh.py", *flags, "--micro-batch-size", "1"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "metrics.jsonl").exists() or not losses(tmp_path):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) >= 2
        process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(ranks, timeout=15)
        assert not alive
    finally:
        process.kill()
