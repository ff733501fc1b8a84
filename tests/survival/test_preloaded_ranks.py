"""tools/launch.py: ranks that are forked from a process with all imports do what ranks of torchrun do."""

import os
import subprocess
import sys

import pytest
from integration_runs import ROOT

from mesh_megatron.commands import launch

SCRIPT = """
import multiprocessing, os, sys

for module in ("megatron.core", "mesh_megatron.training.pretrain"):
    assert module in sys.modules, module
assert multiprocessing.get_start_method() == "fork" or sys.version_info >= (3, 14)
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
print(f"attempt {attempt} rank {rank} parent {os.getppid()} flags {sys.argv[1:]}", flush=True)
if attempt == "0" and rank == "1":
    os.kill(os.getpid(), 9)
if attempt == "0":
    __import__("time").sleep(100)
sys.exit(int(attempt == "2"))
"""


def test_ranks_are_forked_with_their_imports_and_forked_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "tools/launch.py", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, script, "--lr", "3"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("attempt"))
    parents = {line.split()[5] for line in lines}
    assert [line.split()[:4] for line in lines] == [
        ["attempt", attempt, "rank", rank] for attempt in "01" for rank in "01"
    ]
    assert len(parents) == 1 and all(line.endswith("flags ['--lr', '3']") for line in lines)
    assert "terminated with signal SIGKILL" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--module", "package"], "error: --module: ranks are forked and run a Python script"),
        (["--no-python", "mesh-pretrain"], "error: --no-python: ranks are forked"),
        (["--start-method", "fork", "tools/plan.py"], "error: --start-method fork: "),
        (["--shutdown-timeout", "2", "tools/plan.py"], "error: --shutdown-timeout 2: "),
        (["no_such_script.py"], "error: no_such_script.py does not exist"),
    ],
)
def test_refusals(flags, message, capsys):
    assert launch.main(flags) == 2
    assert message in capsys.readouterr().err


def test_an_installed_program_is_found(tmp_path, monkeypatch):
    program = tmp_path / "mesh-something"
    program.write_text("#!/usr/bin/env python\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    from torch.distributed import run

    assert launch.find_script(run.parse_args(["mesh-something", "--lr", "3"])) == str(program)
