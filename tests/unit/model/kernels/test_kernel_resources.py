"""What the compiler takes: the interpreter takes more. Every kernel is assembled for GPUs, which needs none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (requirements/dev.txt)")
ROOT = Path(__file__).parents[4]
KERNELS = {
    "_forward_kernel", "_backward_kernel", "_routing_backward_kernel", "_route_kernel", "_route_backward_kernel",
    "_statistics_kernel", "_gradient_kernel", "_turn_kernel",
}  # fmt: skip
LEAST_SHARED_MEMORY = 99 * 1024  # of a block on consumer cards of capability 8.6, 8.9 and 12.0; others have more


@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings NVIDIA's assembler on Linux only")
@pytest.mark.parametrize(
    ("capability", "spilled"),
    [pytest.param(80, 24, marks=pytest.mark.full), (90, 8), pytest.param(100, 16, marks=pytest.mark.full)],
)
def test_kernels_fit(capability: int, spilled: int) -> None:
    """Nearly nothing is spilled: on 9.0 two registers, in float32 with 16 slots at D = 8192."""
    command = [sys.executable, "benchmarks/kernel_resources.py", "--json", str(capability)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout)
    assert {kernel["name"] for kernel in usage} == KERNELS
    assert {kernel["capability"] for kernel in usage} == {capability}
    assert sum(kernel["stack"] for kernel in usage) <= spilled
    assert not [k for k in usage if k["stack"] and k["name"] == "_backward_kernel" and k["SLOTS"] < 16]
    assert max(kernel["shared"] for kernel in usage) <= LEAST_SHARED_MEMORY
