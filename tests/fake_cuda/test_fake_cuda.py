"""One step of training as a GPU would see it, on a machine without: see ``machine.py`` for how.

It fails where a CPU tensor meets one of the GPU, nccl gets one, a parameter stays behind, or the host waits too often.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from mesh_megatron.config.model import Recurrence

pytestmark = pytest.mark.full

HERE = Path(__file__).parent
SMALL = (
    "--layout 1+1R2+1 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --padded-vocab-size 96 --mock-data "
    "--num-workers 0 --micro-batch-size 1 --lr 2e-3 --train-iters 3 --log-interval 3 --eval-interval 3 --eval-iters 1 "
    "--global-batch-size 4"
)
PYTHIA = (
    "--preset pythia-410m --bf16 --mock-data --tokenizer-type NullTokenizer --vocab-size 50303 --num-workers 0 "
    "--micro-batch-size 4 --lr 3e-4 --train-iters 3 --log-interval 3 --eval-iters 0 --global-batch-size 12"
)
SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 10000"
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
EXPERTS = "--num-experts 4 --moe-router-topk 2"
# Name: this rank, all ranks, flags.
DENSE = {
    "bf16": (0, 1, "--bf16"),
    "fp16": (0, 1, "--fp16"),
    "gated": (0, 1, "--swiglu --normalization RMSNorm --disable-bias-linear --num-query-groups 2 --loss-kernel torch"),
    "without Triton": (0, 1, "--memory-kernel torch --loss-kernel torch"),
    "recomputed": (0, 1, "--recompute-granularity full"),
    "watched": (0, 1, "--probe-interval 1 --rerun-mode disabled"),
    "exit gate": (0, 1, "--layout 1+1R3+1 --exit-gate --bf16"),
    "losses of loops": (0, 1, "--layout 1+1R3+1 --loop-loss-weights 1 1 2"),
    "timed": (0, 1, "--timing-log-level 2 --log-timers-to-tensorboard"),
    "tp2": (0, 2, TP2),
    "tp2-sp": (1, 2, f"{TP2} --sequence-parallel"),
    "pp2-first": (0, 2, PP2),
    "pp2-last": (1, 2, PP2),
    "cp2": (0, 2, "--context-parallel-size 2"),
    "dp2": (0, 2, ""),
    "dp2-distopt": (0, 2, f"{SHARDED} --bf16"),
}
MOE = {
    "one rank": (0, 1, EXPERTS),
    "ep2": (0, 2, f"{EXPERTS} --expert-model-parallel-size 2"),
    "biases": (0, 1, f"{EXPERTS} --moe-router-score-function sigmoid --moe-router-enable-expert-bias"),
}
BAR = 10  # waits a step


class FakeMachine:
    """A process with a fake GPU, which takes one case after the other."""

    def __init__(self, driver: Path, log: Path) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "steps.py"), str(driver)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, cwd=HERE.parents[1],
            env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0",
                 "PYTHONPATH": f"{HERE.parents[1]}:{os.environ.get('PYTHONPATH', '')}"},
        )  # fmt: skip

    def ask(self, flags: str, rank: int = 0, world_size: int = 1, fault: str | None = None) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        case = {"flags": flags.split(), "rank": rank, "world_size": world_size, "fault": fault}
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        code = self._process.wait()
        raise AssertionError(f"the fake machine has died with exit code {code}: {self._log.read_text()[-3000:]}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeMachine]:
    if torch.version.cuda is not None or shutil.which("g++") is None:
        pytest.skip("needs g++ and a build of torch for the CPU, whose place for CUDA is free")
    folder, torch_folder = tmp_path_factory.mktemp("driver"), Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", str(HERE / "driver.cpp")]
    command += ["-o", str(folder / "driver.so"), f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    machine = FakeMachine(folder / "driver.so", folder / "log")
    yield machine
    machine.close()


def check(answer: dict[str, Any]) -> dict[str, Any]:
    """The run has come to its end as it should on a GPU; its second step, with neither beginning nor end in it."""
    assert "error" not in answer, answer["trace"]
    assert answer["code"] == 0
    assert answer["left behind"] == []
    assert len(answer["steps"]) == 3
    for step in answer["steps"]:
        assert step["unknown waits"] == [], "the watchdog of hangs takes a rank that waits here for a busy one"
    return answer["steps"][1]


def run_small(gpu: FakeMachine, folder: Path, case: tuple[int, int, str], fault: str | None = None) -> dict[str, Any]:
    rank, ranks, flags = case
    save = f"--save {folder / 'run'}" if rank == 0 else ""  # another rank would look for what rank 0 has written
    return gpu.ask(f"{SMALL} {save} {flags}", rank, ranks, fault)


@pytest.mark.parametrize("recurrence", get_args(Recurrence))
def test_schemes(gpu, tmp_path, recurrence):
    layout = "--layout 4" if recurrence == "vanilla" else ""
    flags = SMALL.replace("--layout 1+1R2+1", layout) if layout else SMALL
    step = check(gpu.ask(f"{flags} --save {tmp_path / 'run'} --recurrence {recurrence}"))
    assert sum(step["waits"].values()) <= BAR, step["waits"]
    assert step["micro-batch waits"] == {}
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text().strip() == "3"


@pytest.mark.parametrize("name", DENSE)
def test_layouts(gpu, tmp_path, name):
    step = check(run_small(gpu, tmp_path, DENSE[name]))
    assert sum(step["waits"].values()) <= BAR, step["waits"]
    assert not step.get("micro-batch waits")


def test_a_gate_alone(gpu, tmp_path):
    flags = "--layout 1+1R3+1 --exit-gate --bf16"
    check(run_small(gpu, tmp_path, (0, 1, flags)))
    flags += f" --exit-gate-only --finetune --load {tmp_path / 'run'}"
    step = check(gpu.ask(f"{SMALL} {flags} --save {tmp_path / 'gate'}"))
    assert sum(step["waits"].values()) <= BAR, step["waits"]
    assert step["micro-batch waits"] == {}


@pytest.mark.parametrize("name", MOE)
def test_experts_wait_only_to_know_how_many_tokens_go_where(gpu, tmp_path, name):
    step = check(run_small(gpu, tmp_path, MOE[name]))
    others = {place: count for place, count in step["waits"].items() if "moe/" not in place}
    assert sum(others.values()) <= BAR, others
    assert all("moe/" in place for place in step.get("micro-batch waits", {}))


def test_pythia_410m(gpu):
    step = check(gpu.ask(PYTHIA))
    assert sum(step["waits"].values()) <= 4, ("loss, tokens, norm, and all that ranks agree on", step["waits"])
    assert step["micro-batch waits"] == {}
    assert step["micro-batch operations"] <= 3100, "each is a launch, of some microseconds on the host"


@pytest.mark.parametrize(
    "fault, error",
    [
        ("a CPU tensor among those of the GPU", "Expected all tensors to be on the same device"),
        ("a collective of a CPU tensor", "nccl cannot carry a tensor of the CPU"),
    ],
)
def test_faults_that_end_a_run_are_seen(gpu, tmp_path, fault, error):
    assert error in run_small(gpu, tmp_path, (0, 1, ""), fault)["error"]


def test_a_buffer_left_behind_is_seen(gpu, tmp_path):
    assert run_small(gpu, tmp_path, (0, 1, ""), "a buffer left on the CPU")["left behind"] == ["forgotten"]


def test_waits_of_every_micro_batch_are_seen(gpu, tmp_path):
    step = run_small(gpu, tmp_path, (0, 1, ""), "a read of every micro-batch")["steps"][0]
    assert list(step["micro-batch waits"].values()) == [1]
