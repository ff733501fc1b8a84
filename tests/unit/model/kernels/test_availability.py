"""Kernels that would die in the first micro-batch are found in the preflight."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (requirements/dev.txt)")
from mesh_megatron.model.kernels import (  # noqa: E402
    availability,
    cross_entropy_torch,
    probe_triton,  # noqa: E402
)

CPU = torch.device("cpu")


def test_the_probe_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    real = probe_triton.launch
    monkeypatch.setattr(probe_triton, "launch", lambda device: launched.append(device) or real(device))
    availability.check_fused_kernels(CPU)
    assert not launched, "a CPU needs no kernels"
    monkeypatch.setattr(availability, "_on_gpu", lambda device: True)
    availability.check_fused_kernels(CPU)  # in Triton's interpreter
    assert launched == [CPU]


def test_a_kernel_that_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(availability, "_on_gpu", lambda device: True)
    monkeypatch.setattr(probe_triton, "launch", launch)
    way_out = "--memory-kernel torch --loss-kernel torch --no-rope-fusion"
    with pytest.raises(ValueError, match=rf"\(Failed to find C compiler.*variable\.\)\. It needs .*{way_out}"):
        availability.check_fused_kernels(CPU)


def test_a_kernel_that_leaves_its_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __getitem__(self, grid: tuple[int]) -> object:
            return lambda *args: None

    monkeypatch.setattr(probe_triton, "_add_one", Nothing())
    with pytest.raises(RuntimeError, match="did not change its output"):
        probe_triton.launch(CPU)


def test_a_gpu_takes_a_chunk_of_logits_at_once() -> None:
    assert cross_entropy_torch._tokens_at_once(torch.empty(100, 7)) == cross_entropy_torch.TOKENS_OF_CPU
    assert cross_entropy_torch._tokens_at_once(torch.empty(100, 7, device="meta")) == 100
