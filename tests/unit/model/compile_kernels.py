"""Assemble every Triton kernel for sm_90 on any machine; prints what each uses, as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from mesh_megatron.model.kernels import cross_entropy_triton, memory_triton, rotary_triton, route_triton
from mesh_megatron.model.kernels.memory_torch import Boundary, LaterGradient

KERNELS = {
    memory_triton: ("_forward_kernel", "_backward_kernel", "_routing_backward_kernel"),
    route_triton: ("_route_kernel", "_route_backward_kernel"),
    cross_entropy_triton: ("_statistics_kernel", "_gradient_kernel"),
    rotary_triton: ("_turn_kernel",),
}
BOUNDARIES = [  # positions, cycle, loops, slots, hidden size, dtype, with a router
    (4096, 0, 2, 5, 2048, torch.bfloat16, True),
    (4096, 1, 2, 5, 1024, torch.bfloat16, True),
    (4096, 2, 2, 5, 2048, torch.bfloat16, False),
    (4096, 0, 8, 11, 1024, torch.bfloat16, True),
    (1024, 1, 2, 16, 8192, torch.float32, True),
    (1024, 1, 2, 5, 77, torch.float16, True),
]


class HopperDriver:
    """As much of a Triton driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Stands in for a kernel: a launch compiles for its arguments and notes the registers and stack it takes."""

    def __init__(self, module: ModuleType, name: str, usage: list[dict[str, Any]]) -> None:
        self.name, self.kernel, self.usage = name, getattr(module, name), usage

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            cubin = self.kernel.warmup(*args, grid=grid, **constants).asm["cubin"]
            report = resources(cubin)
            self.usage.append({"name": self.name, "registers": report["REG"], "stack": report["STACK"]} | constants)

        return launch


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    return {name: int(count) for name, count in re.findall(r"(REG|STACK):(\d+)", text)}


def compile_boundary(
    positions: int, cycle: int, loops: int, slots: int, width: int, dtype: torch.dtype, route: bool
) -> None:
    """Launch every kernel of one boundary; with the compiling stand-ins, nothing runs."""
    shape = (positions, 4, width)

    def tensor() -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)  # never touched

    def routing() -> torch.Tensor:
        return torch.zeros(*shape[:2], 2 * slots)

    sources, routings = [tensor() for _ in range(cycle + 2)], [routing() for _ in range(cycle + 1)]
    weight, bias = (torch.zeros(2 * slots, width), torch.zeros(2 * slots)) if route else (None, None)
    state, following = memory_triton.forward(sources, routings, weight, bias)
    later = [LaterGradient(tensor(), routing(), torch.zeros(*shape[:2], j + 2)) for j in range(loops, cycle, -1)]
    boundary = Boundary(sources, routings, state, following, weight)
    memory_triton.backward(boundary, tensor(), following, later)
    if weight is not None and bias is not None and following is not None:
        route_triton.backward(following, route_triton.forward(state, weight, bias), state, weight)


def compile_loss(vocabulary: int, dtype: torch.dtype) -> None:
    logits, rows = torch.zeros(64, vocabulary, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    normalizer, weights = cross_entropy_triton.statistics(logits, rows)
    cross_entropy_triton.gradient(logits, rows, normalizer, weights)


def compile_rotary(heads: int, channels: int, rotary: int, dtype: torch.dtype) -> None:
    queries = torch.empty(64, 2, heads, 3 * channels, dtype=dtype)[..., :channels]
    rotations = torch.zeros(2, 64, 1, 1, rotary)
    rotary_triton.turn(queries, rotations, backwards=False)
    rotary_triton.turn(queries, rotations, backwards=True)


def main() -> None:
    triton.runtime.driver.set_active(HopperDriver())
    usage: list[dict[str, Any]] = []
    for module, names in KERNELS.items():
        for name in names:
            setattr(module, name, Compiled(module, name, usage))
    for boundary in BOUNDARIES:
        compile_boundary(*boundary)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compile_loss(52352, dtype)
    for heads, channels, rotary in ((16, 64, 16), (32, 128, 128), (5, 80, 20)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            compile_rotary(heads, channels, rotary, dtype)
    print(json.dumps(usage))


if __name__ == "__main__":
    main()
