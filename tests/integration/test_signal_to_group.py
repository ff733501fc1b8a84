"""A stop signal for a run and for every process that it has started, as torchrun, terminals and SLURM send it."""

import os
import signal
import subprocess
import sys

import pytest
from integration_runs import ROOT, SMALL, losses


@pytest.mark.parametrize("flags", [[], ["--async-save"]], ids=["save", "async-save"])
def test_what_helps_with_a_checkpoint_survives(corpus, tmp_path, flags):
    flags = [*SMALL, *flags, "--data-path", corpus, "--train-iters", "100000", "--save", tmp_path, "--save-interval", "2"]
    process = subprocess.Popen(
        [sys.executable, "pretrain_mesh.py", *map(str, flags)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("iteration        5/"):  # the first checkpoint has started what the later ones need
            os.killpg(process.pid, signal.SIGTERM)
    process.wait()
    stopped = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert stopped >= 5 and max(losses(tmp_path)) == stopped
