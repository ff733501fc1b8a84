"""Processes and the GPUs of their machine."""

import os

import pytest
import torch

from mesh_megatron.platform import device


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    device.check_gpus()  # on a CPU any number is right
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    mend = r"start one a GPU \(--nproc-per-node 1\), or hide the GPUs .* \(CUDA_VISIBLE_DEVICES=\)"
    with pytest.raises(ValueError, match=f"2 processes were started on a machine with 1 GPU: {mend}"):
        device.check_gpus()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device.check_gpus()


def test_sums_in_a_fixed_order(monkeypatch):
    monkeypatch.setattr(os, "environ", {"NCCL_ALGO": "Tree"})
    try:
        device.add_in_fixed_order()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ["NCCL_ALGO"] == "Tree" and os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
