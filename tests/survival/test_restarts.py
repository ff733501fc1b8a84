"""torchrun restarts the ranks after one has died and after one has hung, which is reported."""

import os
import re
import subprocess
import sys

import pytest
from chaos import compare
from fleet import Fleet
from integration_runs import LAUNCH, ROOT, SMALL, TORCHRUN

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    "launcher",
    [[*TORCHRUN, "--shutdown-timeout", "2"], LAUNCH],
    ids=["torchrun", "launch"],
)
def test_a_rank_that_dies_and_a_rank_that_hangs(launcher, corpus, tmp_path):
    flags = [
        *(*SMALL, "--data-path", corpus, "--train-iters", "12", "--save-interval", "2", "--micro-batch-size", "1"),
        *("--distributed-timeout-minutes", "0.4"),
    ]
    with Fleet(2, [*flags, "--save", tmp_path / "whole"], tmp_path / "logs") as fleet:
        assert fleet.exit_codes() == [0, 0], fleet.output(0)
    started = [sys.executable, *launcher, "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    result = subprocess.run(
        [*started, "tests/survival/faulty_pretrain.py", *flags, "--save", tmp_path / "restarted"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-5000:]
    assert re.findall(r"continuing from \S+ at iteration (\d+)", result.stdout) == ["4", "8"]
    # Step 9 is the fifth after the first restart; rank 1 hangs in it.
    (warning,) = [line for line in result.stderr.splitlines() if "does not end" in line]
    assert "step 9 does not end; rank 1 on " in warning and "in step 9" in warning
    assert "faulty_pretrain.py" in warning and "time.sleep(3600)" in warning
    assert "rank 0" not in warning
    compare(tmp_path / "whole", tmp_path / "restarted")
