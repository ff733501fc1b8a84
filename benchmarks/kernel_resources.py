"""Compile every Triton kernel for several GPUs on any machine: registers, spills and shared memory of each.

python benchmarks/kernel_resources.py                    # prints a table for compute capability 8.0, 9.0 and 10.0
python benchmarks/kernel_resources.py --json 90          # one GPU, every launch as JSON
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget

from mesh_megatron.model.kernels import cross_entropy_triton, memory_triton, rotary_triton, route_triton
from mesh_megatron.model.kernels.memory_torch import Boundary, LaterGradient
from mesh_megatron.model.memory import Gate

KERNELS = {
    memory_triton: ("_forward_kernel", "_backward_kernel", "_routing_backward_kernel"),
    route_triton: ("_route_kernel", "_route_backward_kernel"),
    cross_entropy_triton: ("_statistics_kernel", "_gradient_kernel"),
    rotary_triton: ("_turn_kernel",),
}
BOUNDARIES = [  # positions, cycle, loops, slots, hidden size, dtype, the gate of a router if there is one
    (4096, 0, 2, 5, 2048, torch.bfloat16, "softmax"),
    (4096, 1, 2, 5, 1024, torch.bfloat16, "softmax"),
    (4096, 2, 2, 5, 2048, torch.bfloat16, None),
    (4096, 0, 8, 11, 1024, torch.bfloat16, "softmax"),
    (1024, 1, 2, 16, 8192, torch.float32, "softmax"),
    (1024, 1, 2, 5, 77, torch.float16, "softmax"),
    (4096, 1, 2, 5, 1024, torch.bfloat16, "sigmoid"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITIES = (80, 90, 100)


class Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps what it has compiled by device, not by target

    def get_current_stream(self, device: int) -> int:
        return 0


class StandIn:
    """Stands in for a kernel: a launch is handed to ``launched`` with the kernel, its grid and its arguments."""

    def __init__(self, kernel: Any, launched: Callable[..., None]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **constants: self.launched(self.kernel, grid, args, constants)


def hand_launches_to(launched: Callable[..., None]) -> None:
    """Replace every kernel by its stand-in, for the life of the process."""
    for module, names in KERNELS.items():
        for name in names:
            kernel: ModuleType = getattr(module, name)
            setattr(module, name, StandIn(kernel, launched))


def launch_all() -> None:
    """Launch every kernel at sizes of training; what their results would be is never read."""
    for boundary in BOUNDARIES:
        launch_boundary(*boundary)
    for dtype in DTYPES:
        launch_loss(52352, dtype)
        for heads, channels, rotary in ((16, 64, 16), (32, 128, 128), (5, 80, 20)):
            launch_rotary(heads, channels, rotary, dtype)


def launch_boundary(
    positions: int, cycle: int, loops: int, slots: int, width: int, dtype: torch.dtype, gate: Gate | None
) -> None:
    """Launch the kernels of one boundary, forward and backward."""
    shape = (positions, 4, width)

    def tensor() -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)  # never touched

    def routing() -> torch.Tensor:
        return torch.zeros(*shape[:2], 2 * slots)

    sources, routings = [tensor() for _ in range(cycle + 2)], [routing() for _ in range(cycle + 1)]
    weight, bias = (torch.zeros(2 * slots, width), torch.zeros(2 * slots)) if gate else (None, None)
    state, following = memory_triton.forward(sources, routings, weight, bias, gate or "softmax")
    later = [LaterGradient(tensor(), routing(), torch.zeros(*shape[:2], j + 2)) for j in range(loops, cycle, -1)]
    boundary = Boundary(sources, routings, state, following, weight, gate or "softmax")
    memory_triton.backward(boundary, tensor(), following, later)
    if weight is not None and bias is not None and following is not None and gate is not None:
        route_triton.backward(following, route_triton.forward(state, weight, bias, gate), state, weight, gate)


def launch_loss(vocabulary: int, dtype: torch.dtype) -> None:
    logits, rows = torch.zeros(64, vocabulary, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    normalizer, weights = cross_entropy_triton.statistics(logits, rows)
    cross_entropy_triton.gradient(logits, rows, normalizer, weights)


def launch_rotary(heads: int, channels: int, rotary: int, dtype: torch.dtype) -> None:
    queries = torch.empty(64, 2, heads, 3 * channels, dtype=dtype)[..., :channels]
    rotations = torch.zeros(2, 64, 1, 1, rotary)
    rotary_triton.turn(queries, rotations, backwards=False)
    rotary_triton.turn(queries, rotations, backwards=True)


def compile_all(capabilities: tuple[int, ...]) -> list[dict[str, Any]]:
    """Compile every launch for each capability: name, resources in bytes and registers, and constants."""
    usage: list[dict[str, Any]] = []

    def compile_launch(kernel: Any, grid: tuple[int, ...], args: Any, constants: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=grid, **constants)
        used = resources(compiled.asm["cubin"])
        used |= {"shared": compiled.metadata.shared, "threads": 32 * compiled.metadata.num_warps}
        usage.append({"name": kernel.__name__, "capability": capability, **used, **constants})

    hand_launches_to(compile_launch)
    for capability in capabilities:
        triton.runtime.driver.set_active(Driver(capability))
        launch_all()
    return usage


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    found = {name: int(count) for name, count in re.findall(r"(REG|STACK):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"]}


def table(usage: list[dict[str, Any]]) -> str:
    """One row per kernel and GPU: the largest of its launches, and how many spill how much."""
    lines = [
        "| kernel | compute capability | launches | registers | shared memory | spilled |",
        "|---|---|---|---|---|---|",
    ]
    for name, capability in dict.fromkeys((kernel["name"], kernel["capability"]) for kernel in usage):
        own = [kernel for kernel in usage if (kernel["name"], kernel["capability"]) == (name, capability)]
        registers, shared, spilled = (max(kernel[key] for kernel in own) for key in ("registers", "shared", "stack"))
        spills = sum(kernel["stack"] > 0 for kernel in own)
        what = f"{spilled} bytes, {spills} of {len(own)}" if spilled else "none"
        cells = (f"`{name}`", f"{capability / 10:.1f}", len(own), registers, f"{shared:,} bytes", what)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capabilities", nargs="*", type=int, default=CAPABILITIES)
    parser.add_argument("--json", action="store_true", help="print every launch as JSON")
    flags = parser.parse_args()
    usage = compile_all(tuple(flags.capabilities))
    print(json.dumps(usage) if flags.json else f"Triton {triton.__version__}\n\n{table(usage)}")


if __name__ == "__main__":
    main()
