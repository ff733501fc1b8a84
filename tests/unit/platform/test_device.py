"""Processes and the GPUs of their machine."""

import os
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mesh_megatron.platform import device


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    device.check_gpus()  # on a CPU any number is right
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fix = r"start one per GPU \(--nproc-per-node 1\), or hide the GPUs .* \(CUDA_VISIBLE_DEVICES=\)"
    with pytest.raises(ValueError, match=f"2 processes were started on a machine with 1 GPU: {fix}"):
        device.check_gpus()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device.check_gpus()


def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch, tmp_path):
    control, version = tmp_path / "nvidiactl", tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 24 22:55:56 UTC 2024\n")
    monkeypatch.setattr(device, "NVIDIA_CONTROL", control)
    monkeypatch.setattr(device, "NVIDIA_VERSION", version)
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device.check_gpus()  # no GPU in this machine
    control.touch()
    with pytest.raises(ValueError, match=r"CUDA 13.0 needs driver 580 or newer, and 535.161.08 is loaded.*=\)"):
        device.check_gpus()
    with pytest.raises(ValueError, match="needs driver 580"):
        device.start_process_group()
    version.unlink()
    with pytest.raises(ValueError, match="and an unknown one is loaded"):
        device.check_gpus()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ValueError, match="needs driver 525"):
        device.check_gpus()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        device.check_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.version, "cuda", None)
    device.check_gpus()  # a torch without CUDA was chosen on purpose


def test_sums_in_a_fixed_order(monkeypatch):
    monkeypatch.setattr(os, "environ", {"NCCL_ALGO": "Tree"})
    try:
        device.add_in_fixed_order()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ["NCCL_ALGO"] == "Tree" and os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"


def test_bf16_products_are_added_in_float32():
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    try:
        device.add_products_in_float32()
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


@pytest.fixture
def joined(monkeypatch):
    """Return the arguments of ``init_process_group`` on a machine with GPUs."""
    calls = []
    monkeypatch.setattr(os, "environ", {"LOCAL_RANK": "1"})
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(torch.cuda, "current_device", lambda: index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    group = SimpleNamespace(bound_device_id="cuda:1")
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: group)
    return calls


@pytest.mark.parametrize("environment", [{}, {"RANK": "1"}])
def test_nccl_knows_its_gpu(joined, monkeypatch, environment):
    os.environ.update(environment)
    device.start_process_group()
    (args, kwargs), *others = joined
    assert not others and args == ("nccl",)
    assert kwargs["device_id"] == torch.device("cuda", 1)


def test_groups_made_later_connect_when_they_are_used(joined):
    """On an H200, 18 groups connected at once held 7 GiB of one GPU; when used, 90 MiB."""
    device.start_process_group()
    assert dist.distributed_c10d._get_default_group().bound_device_id is None


@pytest.fixture
def own_cudnn(tmp_path, monkeypatch):
    """A machine whose torch brought its cuDNN along; the names of the parts that get loaded."""
    lib = tmp_path / "nvidia/cudnn/lib"
    lib.mkdir(parents=True)
    for name in ("", "_adv", "_engines_precompiled", "_graph", "_heuristic", "_ops"):
        (lib / f"libcudnn{name}.so.9").touch()
    loaded: list[str] = []
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda path, mode: loaded.append(path))
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name == "transformer_engine")
    monkeypatch.setenv("CUDNN_HOME", "")
    monkeypatch.delenv("CUDNN_HOME")
    return lib, loaded


def test_transformer_engine_gets_torchs_cudnn(own_cudnn):
    lib, loaded = own_cudnn
    device.prepare()
    assert os.environ["CUDNN_HOME"] == str(lib.parent)
    assert sorted(loaded) == sorted(str(part) for part in lib.iterdir())
    assert [path.removeprefix(f"{lib}/") for path in loaded[:2]] == ["libcudnn_graph.so.9", "libcudnn_ops.so.9"]


def test_a_cudnn_of_ones_own_is_kept(own_cudnn, monkeypatch):
    monkeypatch.setenv("CUDNN_HOME", "/opt/cudnn")
    device.prepare()
    assert os.environ["CUDNN_HOME"] == "/opt/cudnn" and own_cudnn[1] == []


def test_lost_ranks_end_a_process(joined):
    device.start_process_group()
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"


@pytest.mark.parametrize("name", ["TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"])
def test_a_process_that_would_wait_for_ever_is_refused(joined, name):
    os.environ[name] = "0"
    with pytest.raises(ValueError, match=f"{name}=0: a rank that loses another would wait for ever; unset it"):
        device.start_process_group()
    assert not joined
    os.environ[name] = "1"
    device.start_process_group()
    assert os.environ[name] == "1"


def test_a_warning_that_no_user_can_act_on_is_not_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        device.prepare()
        warnings.warn("`load_state_dict` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("another", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["another"]
