"""Check where Triton kernels can run."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch


def fused_kernels_run(device: torch.device) -> bool:
    """Return whether Triton kernels can process tensors on ``device`` at full speed."""
    return _on_gpu(device) and _has_triton()


def require_fused_kernels(flag: str, device: torch.device) -> None:
    """Raise ``ValueError`` if ``flag`` requests kernels that cannot run; ``flag`` also accepts auto and torch.

    For tests, Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU.
    """
    if not _has_triton():
        raise ValueError(f"{flag} fused needs Triton: pip install triton, or use {flag} torch")
    if not _on_gpu(device):
        import triton

        if not triton.knobs.runtime.interpret:
            raise ValueError(f"{flag} fused needs a GPU and the model is on {device}: use auto or torch")


def check_fused_kernels(device: torch.device) -> None:
    """Raise ``ValueError`` if Triton is installed for ``device`` but cannot compile or launch a kernel.

    Triton builds its launcher with a C compiler and Python's headers and needs libcuda; without one of them the first
    micro-batch would fail.
    """
    if not fused_kernels_run(device):
        return
    from mesh_megatron.model.kernels import probe_triton  # needs Triton

    try:
        probe_triton.launch(device)
    except Exception as error:  # compilers, loaders and drivers fail in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--memory-kernel, --loss-kernel: Triton's kernels do not run on this machine ({reason}). "
            "It needs a C compiler, Python's headers and libcuda (apt install gcc python3-dev); or go without kernels: "
            "--memory-kernel torch --loss-kernel torch --no-rope-fusion"
        ) from error


def _on_gpu(device: torch.device) -> bool:
    return device.type not in ("cpu", "meta")


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
