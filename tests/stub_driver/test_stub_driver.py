"""Every Triton kernel through Triton's own launcher, into a driver that runs nothing and keeps what it is given.

``cuda.c`` is the driver. It needs a C compiler and Python.h, as Triton's launcher does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed (requirements/dev.txt)")

HERE = Path(__file__).parent
COMPILER = shutil.which("gcc")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(COMPILER is None, reason="needs gcc"),
    pytest.mark.skipif(not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="needs Python.h"),
]
HOPPER, SHARED_MEMORY = 90, 227 * 1024
EVERY_KERNEL = {
    "_forward_kernel", "_backward_kernel", "_routing_backward_kernel", "_route_kernel", "_route_backward_kernel",
    "_statistics_kernel", "_gradient_kernel", "_turn_kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    header = Path(triton.__file__).parent / "backends/nvidia/include"
    command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-I{header}", "-o", library, HERE / "cuda.c"]
    subprocess.run(list(map(str, command)), check=True)
    return library


def launch_all(driver: Path, shared_memory: int = SHARED_MEMORY) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "TRITON_LIBCUDA_PATH": str(driver.parent), "LD_LIBRARY_PATH": str(driver.parent),
        "TRITON_CACHE_DIR": str(driver.parent / "cache"), "TRITON_INTERPRET": "0",
        "PYTHONPATH": str(HERE.parents[1]),
    }  # fmt: skip
    command = [sys.executable, HERE / "launches.py", driver, HOPPER, shared_memory]
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def launches(driver: Path) -> list[dict[str, Any]]:
    done = launch_all(driver)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_launched_once_a_call(launches: list[dict[str, Any]]) -> None:
    assert {launch["kernel"] for launch in launches} == EVERY_KERNEL
    assert all(launch["launches"] == 1 and launch["stream"] for launch in launches)


@pytest.mark.parametrize("what", ["grid", "block", "shared"])
def test_sizes_arrive(what: str, launches: list[dict[str, Any]]) -> None:
    for launch in launches:
        arrived, asked = launch[what]
        assert arrived == asked, launch["kernel"]


def test_every_pointer_and_number_is_at_its_place(launches: list[dict[str, Any]]) -> None:
    """The kernel's own declaration says how many parameters there are, and how wide; two more are Triton's."""
    for launch in launches:
        arrived, passed = launch["parameters"]
        assert arrived[: len(passed)] == passed, launch["kernel"]
        assert arrived[len(passed) :] == ["0" * 16] * 2, launch["kernel"]


def test_too_small_a_gpu_is_noticed(driver: Path) -> None:
    """The driver refuses what does not fit: it is asked, then."""
    done = launch_all(driver, shared_memory=32 * 1024)
    assert done.returncode != 0 and "out of resource: shared memory" in done.stderr, done.stderr[-3000:]
