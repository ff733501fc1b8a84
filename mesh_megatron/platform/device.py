"""Device and communication backend: CUDA with nccl, or the CPU with gloo. Other rooms name neither."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mesh_megatron.platform import cpu
from mesh_megatron.platform.launcher import number_in_environment
from mesh_megatron.platform.rendezvous import fresh_store, restarts

NVIDIA_CONTROL = Path("/dev/nvidiactl")
NVIDIA_VERSION = Path("/proc/driver/nvidia/version")
LEAST_DRIVERS = {13: 580, 12: 525, 0: 450}
"""By CUDA's major version: the oldest Linux driver that runs its builds (NVIDIA's minor-version compatibility)."""
_END_PROCESS = ("3", "1")  # without cleaning up first, which may hang, or after it


def prepare() -> None:
    """Make ``megatron.core`` importable here; call it before the first import of it.

    Without CUDA, the name "cuda" becomes an alias of the CPU (see ``cpu.py``). Calling it again does nothing.
    """
    # Kernels start in the order they are issued, which tensor and sequence parallelism need to overlap with transfers.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Megatron-Core asks every slice of a parameter for a gradient (0.16.1): a warning from each of a thousand ranks.
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message=r"`load_state_dict` is deprecated")  # dist_checkpointing calls it
    warnings.filterwarnings("ignore", message=r"MimoModelConfig is experimental")  # 0.19, when it is imported
    if torch.cuda.is_available():
        _share_torchs_cudnn()
    else:
        cpu.alias_cuda()


def _share_torchs_cudnn() -> None:
    """Have Transformer Engine use the cuDNN that came with torch, where the system has one too.

    It looks for the system's first, and its library names cuDNN's eight parts, of which torch has loaded only some. Of
    two versions in one process parts get mixed: undefined symbols, or CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED.
    """
    cudnn = Path(torch.__file__).parent.parent / "nvidia" / "cudnn"
    if "CUDNN_HOME" in os.environ or not cudnn.is_dir() or importlib.util.find_spec("transformer_engine") is None:
        return
    os.environ["CUDNN_HOME"] = str(cudnn)
    parts = sorted((cudnn / "lib").glob("libcudnn*.so.*"), key=_what_others_need_first)
    with contextlib.suppress(OSError):  # the engine's own import reports it better
        for part in parts:
            ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)


def _what_others_need_first(part: Path) -> tuple[bool, bool, str]:
    return "graph" not in part.name, "ops" not in part.name, part.name


def check_driver() -> None:
    """Raise ``ValueError`` where torch is built for CUDA and cannot use the NVIDIA GPU of this machine.

    Such a run would train on the CPU, a thousand times slower, without a word. ``CUDA_VISIBLE_DEVICES=`` asks for that.
    """
    if has_gpu() or _gpus_hidden() or torch.version.cuda is None or not NVIDIA_CONTROL.exists():
        return
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = next(driver for cuda, driver in LEAST_DRIVERS.items() if cuda_version() >= (cuda,))
    raise ValueError(
        f"this machine has an NVIDIA GPU that torch {torch.__version__} cannot use: a build for CUDA "
        f"{torch.version.cuda} needs driver {wanted} or newer, and {_driver()} is loaded"
        + (f"; CUDA_VISIBLE_DEVICES is {chosen}, which must name GPUs that exist" if chosen is not None else "")
        + ". Update the driver, install a torch for its CUDA, or train on the CPU on purpose (CUDA_VISIBLE_DEVICES=)"
    )


def uses_no_gpu() -> bool:
    """Return whether it is certain, without starting CUDA, that this process uses no GPU."""
    return _gpus_hidden() or not torch.backends.cuda.is_built()


def _gpus_hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")


def _driver() -> str:
    """Return the version of the NVIDIA kernel driver."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", NVIDIA_VERSION.read_text())
    except OSError:
        found = None
    return found[0] if found else "an unknown one"


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def on_device(numbers: Sequence[float] | float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Make a tensor on this process's device without waiting for a GPU, as ``torch.tensor(..., device=)`` does."""
    return torch.tensor(numbers, dtype=dtype).to(device(), non_blocking=True)


def device_name() -> str:
    """Return a readable name of the device."""
    return torch.cuda.get_device_name() if has_gpu() else f"CPU ({torch.get_num_threads()} threads)"


def compute_capability() -> tuple[int, int]:
    """Return the compute capability of this process's GPU, such as (9, 0) for Hopper."""
    return torch.cuda.get_device_capability()


def cuda_version() -> tuple[int, ...]:
    """Return the CUDA version that torch was built with, such as (12, 9)."""
    return tuple(int(number) for number in (torch.version.cuda or "0").split("."))


def start_process_group(backend: str | None = None, timeout_minutes: float = 10) -> None:
    """Join the other ranks as ``torchrun`` describes them, or be the only one.

    Raises ``ValueError`` when backend and GPUs do not fit, or processes and GPUs.
    """
    if backend == "nccl" and not has_gpu():
        raise ValueError("--distributed-backend nccl needs a GPU: drop the flag or use gloo")
    if backend == "gloo" and has_gpu():
        raise ValueError(
            "--distributed-backend gloo cannot carry a GPU's tensors: drop the flag, or hide the GPUs to train on the "
            "CPU (CUDA_VISIBLE_DEVICES=)"
        )
    check_gpus()
    if has_gpu():
        end_with_nccl_errors()
        torch.cuda.set_device(number_in_environment("LOCAL_RANK", 0))
    timeout = timedelta(minutes=timeout_minutes)
    # With its device nccl connects the ranks here, where all of them wait, and barriers know which GPU is theirs.
    join = partial(
        dist.init_process_group,
        backend or ("nccl" if has_gpu() else "gloo"),
        timeout=timeout,
        device_id=device() if has_gpu() else None,
    )
    if restarts():
        store, rank, world_size = fresh_store(timeout)
        join(store=store, rank=rank, world_size=world_size)
    elif os.environ.get("RANK"):
        join()
    else:
        join(rank=0, world_size=1, store=dist.HashStore())
    if has_gpu():
        _connect_groups_when_used()


def _connect_groups_when_used() -> None:
    """Have nccl connect further groups when something first goes through them.

    Megatron-Core makes dozens and few carry anything; with the device of the first group, nccl would connect each at
    once, and a connection holds GPU memory.
    """
    dist.distributed_c10d._get_default_group().bound_device_id = None


def end_with_nccl_errors() -> None:
    """Have torch's watchdog of nccl end this process when another rank is lost or a collective times out.

    A kernel that waits for a rank which is gone never ends, nor does the host that waits for it. Raises ``ValueError``
    where the environment tells the watchdog only to look on.
    """
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"):  # the second is its older name
        if os.environ.get(name, _END_PROCESS[0]) not in _END_PROCESS:
            raise ValueError(
                f"{name}={os.environ[name]}: a rank that loses another would wait for ever; unset it, or use "
                f"{' or '.join(_END_PROCESS)}"
            )
    if "NCCL_ASYNC_ERROR_HANDLING" not in os.environ:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", _END_PROCESS[0])


def check_gpus() -> None:
    """Raise ``ValueError`` where torchrun has started more processes on this machine than it has GPUs, if any.

    Also where a GPU is there and torch cannot use it.
    """
    check_driver()
    processes = number_in_environment("LOCAL_WORLD_SIZE", 1, least=1)
    gpus = torch.cuda.device_count() if has_gpu() else processes
    if processes > gpus:
        raise ValueError(
            f"{processes} processes were started on a machine with {gpus} GPU{'s' * (gpus > 1)}: start one per GPU "
            f"(--nproc-per-node {gpus}), or hide the GPUs to train on the CPU (CUDA_VISIBLE_DEVICES=)"
        )


def gathers_uneven_parts(backend: str | None = None) -> bool:
    """Return whether ``backend`` (None: the default) gathers parts of different lengths: nccl does, gloo does not."""
    return has_gpu() if backend is None else backend == "nccl"


def world_size() -> int:
    """Ranks of this run, also before the process group starts."""
    return dist.get_world_size() if dist.is_initialized() else number_in_environment("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """Rank of this process, also before the process group starts."""
    return dist.get_rank() if dist.is_initialized() else number_in_environment("RANK", 0)


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: on the GPU if there is one, else in RAM."""
    if has_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def add_in_fixed_order() -> None:
    """Make the GPU's libraries use deterministic algorithms only; call this before they start."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # Transformer Engine's attention
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing of ours reads it


def add_products_in_float32() -> None:
    """Make the GPU add the parts of a bfloat16 matrix product that is computed in parts in float32."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


_OPEN_SPANS = 1024


class Stopwatch:
    """Adds up the device's seconds between ``start`` and ``stop``; a GPU is waited for only in ``take``."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        self._spans.append((self._began, self._now()))
        if len(self._spans) >= _OPEN_SPANS and (not has_gpu() or self._spans[-_OPEN_SPANS // 2][1].query()):
            self._add_up(len(self._spans) - _OPEN_SPANS // 2)

    def take(self) -> float:
        """Seconds since the last call."""
        if has_gpu():
            torch.cuda.synchronize()
        self._add_up(len(self._spans))
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add_up(self, count: int) -> None:
        """Add the first ``count`` spans, which the GPU has passed, and free their events."""
        spans, self._spans = self._spans[:count], self._spans[count:]
        if has_gpu():
            self._seconds += sum(begin.elapsed_time(end) for begin, end in spans) / 1000
        else:
            self._seconds += sum(end - begin for begin, end in spans)

    @staticmethod
    def _now() -> Any:
        if not has_gpu():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def rng_state() -> torch.Tensor:
    """The device's random state, as bytes on the CPU."""
    return torch.cuda.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    torch.cuda.set_rng_state(state)
