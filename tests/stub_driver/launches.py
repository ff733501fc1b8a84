"""Launch every Triton kernel through Triton's own launcher into the stub of ``cuda.c``, and compare what arrives.

``python launches.py LIBRARY CAPABILITY SHARED_MEMORY`` prints a line of JSON for each launch: what the driver was given
and what the call says. LIBRARY is also what Triton has to find as libcuda.so.1.
"""

from __future__ import annotations

import ctypes
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch
import triton
from kernel_resources import hand_launches_to, launch_all
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

STREAM = 0xABC0
MOST = 128
SIZES = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4}
PARAMETER = re.compile(r"\.param \.(\w+)[^\n]*_param_\d+")


class Launch(ctypes.Structure):
    """The ``struct Launch`` of ``cuda.c``."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("count", ctypes.c_uint),
        ("stream", ctypes.c_ulonglong),
        ("parameters", ctypes.c_ulonglong * MOST),
    ]


class Driver(CudaDriver):
    """Triton's driver of the stub; the rest of it asks torch for a GPU."""

    def __init__(self, capability: int) -> None:
        super().__init__()
        self.capability = capability
        self.get_current_device, self.get_current_stream = lambda: 0, lambda device: STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def flat(argument: Any) -> list[bytes]:
    """Return what a call's argument must be as parameters: tuples by their parts, without constants of the kernel."""
    if isinstance(argument, tuple):
        return [part for item in argument for part in flat(item)]
    if isinstance(argument, torch.Tensor):
        return [struct.pack("Q", argument.data_ptr())]
    if isinstance(argument, float):
        return [struct.pack("f", argument)]
    if argument is None or argument == 1:  # compiled into the kernel
        return []
    return [struct.pack("i" if -(2**31) <= argument < 2**31 else "q", argument)]


def declared_sizes(ptx: str) -> list[int]:
    """Return the bytes of each parameter of the kernel, from its assembly."""
    head = ptx[ptx.index(".entry") :]
    return [SIZES[kind] for kind in PARAMETER.findall(head[: head.index(")")])]


def main(library: str, capability: int, shared_memory: int) -> None:
    stub = ctypes.CDLL(library)
    stub.stub_shared_memory(shared_memory)
    triton.runtime.driver.set_active(Driver(capability))
    last = Launch()

    def launch(kernel: Any, grid: tuple[int, ...], args: Any, constants: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=grid, **constants)
        sizes = declared_sizes(compiled.asm["ptx"])
        stub.stub_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        before = stub.stub_launches(ctypes.byref(last))
        kernel[grid](*args, **constants)
        launches = stub.stub_launches(ctypes.byref(last)) - before
        given = [
            number.to_bytes(8, "little")[:size].hex() for number, size in zip(last.parameters, sizes, strict=False)
        ]
        record = {
            "kernel": kernel.__name__, "launches": launches, "stream": last.stream == STREAM,
            "grid": [list(last.grid), [*grid, 1, 1][:3]],
            "block": [list(last.block), [32 * compiled.metadata.num_warps, 1, 1]],
            "shared": [last.shared, compiled.metadata.shared],
            "parameters": [given, [value.hex() for value in flat(args)]],
        }  # fmt: skip
        print(json.dumps(record), flush=True)

    hand_launches_to(launch)
    launch_all()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
