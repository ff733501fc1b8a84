"""A minimal Triton kernel, to test whether kernels compile and launch on this machine."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def launch(device: torch.device) -> None:
    """Run the kernel on ``device``; raises whatever Triton, the C compiler or the driver raises."""
    number = torch.zeros(1, device=device)
    _add_one[(1,)](number)
    if number.item() != 1:
        raise RuntimeError("a kernel ran but did not change its output")


@triton.jit
def _add_one(number):
    tl.store(number, tl.load(number) + 1)
