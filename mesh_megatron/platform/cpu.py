"""An alias of the CPU under the name "cuda", by which unmodified Megatron-Core runs on a machine without CUDA.

Megatron-Core asks for its current device by calling ``torch.cuda.current_device()``, puts tensors on "cuda" and
synchronises streams. This module redirects all of that to the CPU, in five layers; no Megatron function is changed:

1. the host-side runtime of ``torch.cuda`` (device, streams, events, random state);
2. aten's ``empty`` and ``empty_strided`` for the CUDA key, which every factory function calls: they return CPU
   tensors, so ``torch.zeros(..., device="cuda")`` works at no cost per operation;
3. the Python functions whose device argument C++ would refuse: the argument is replaced before C++ reads it;
4. type names, which Megatron-Core compares as text ("torch.cuda.FloatTensor");
5. apex's extension, which adds a weight's gradient to its buffer within the matrix product that computes it.

Transformer Engine and apex are hidden if they are installed.

``torch.cuda.is_available()`` and ``Tensor.is_cuda`` stay false, because torch itself depends on them.
"""

from __future__ import annotations

import functools
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_dispatcher: torch.library.Library | None = None

# Warnings of torch and Megatron-Core, on import, about packages and devices that a CPU run does not need.
_EXPECTED_WARNINGS = (
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    r"User provided device_type of 'cuda', but CUDA is not available",
    r"CUDA is not available or torch_xla is imported",
    r"The following imports from `dynamic_context.py`",
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
    r"`torch\.distributed\.(_reduce_scatter_base|_all_gather_base)` is deprecated",
    r"`torch\.jit\.\w+` is deprecated",
    r"Warning only once for all operators",  # a torch built for CUDA reports that its kernel is replaced
)


def alias_cuda() -> None:
    """Install the alias for the rest of the process; calling it again does nothing.

    Raises ``RuntimeError`` if CUDA is available, or if ``megatron.core`` has been imported (its decorators and default
    arguments are then bound to the real names).
    """
    if _dispatcher is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU platform is only for machines without CUDA")
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "the CPU platform must be prepared before megatron.core is imported: call alias_cuda() first"
        )
    for pattern in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    _hide_gpu_packages()
    _alias_runtime()
    _alias_dispatcher()
    _alias_entry_points()
    _alias_type_names()
    _keep_sent_tensors()
    _gather_one_by_one()
    _provide_extension()
    _import_without_compiler()


def _hide_gpu_packages() -> None:
    """Make two packages that need a GPU fail to import, since Megatron-Core uses each of them that imports."""
    for name in ("transformer_engine", "apex"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


class _Stream(torch.cpu.Stream):
    """The only stream of a CPU; work on it is always complete and in order."""

    priority = 0
    cuda_stream = 0
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def record_event(self, event: _Event | None = None) -> _Event:  # type: ignore[override]
        return event or _Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Do nothing: no work is pending."""


class _Event:
    """A point in time on the CPU's stream; two of them measure wall time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: _Stream | None = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return (end._seconds - self._seconds) * 1e3

    def query(self) -> bool:
        return True

    def wait(self, stream: _Stream | None = None) -> None:
        """Do nothing: a recorded event is complete."""

    synchronize = wait


class _OneGenerator:
    """A replacement of ``torch.cuda.default_generators`` that returns the CPU's generator for every index."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _no_operation() -> Callable[..., None]:
    """Return a new function that does nothing; each use needs its own, as torch keeps tables of functions."""
    return lambda *args, **kwargs: None


def _alias_runtime() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    for name in ("_lazy_init", "set_device", "synchronize", "empty_cache", "set_stream"):
        setattr(cuda, name, _no_operation())
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _no_operation())
    cuda._lazy_call = lambda callback, **kwargs: callback()  # the real one waits until CUDA starts, which never happens
    cuda.current_device = lambda: _CPU
    cuda.Stream, cuda.ExternalStream, cuda.Event = _Stream, _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.stream = torch.cpu.stream
    cuda.default_generators = _OneGenerator()
    generator = torch.default_generator
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: generator.get_state()
        module.set_rng_state = lambda state, device=None: generator.set_state(state)
        module.manual_seed = lambda seed: generator.manual_seed(int(seed))


def _alias_dispatcher() -> None:
    global _dispatcher
    _dispatcher = torch.library.Library("aten", "IMPL")

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):  # type: ignore[no-untyped-def]
        return torch.empty(size, dtype=dtype, device=_CPU, memory_format=memory_format or torch.contiguous_format)

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):  # type: ignore[no-untyped-def]
        return torch.empty_strided(size, stride, dtype=dtype, device=_CPU)

    _dispatcher.impl("empty.memory_format", empty, "CUDA")
    _dispatcher.impl("empty_strided", empty_strided, "CUDA")


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(function: Callable[..., Any], positional: int | None = None) -> Callable[..., Any]:
    """Return ``function`` with a CUDA device argument (by name, or at index ``positional``) replaced by the CPU.

    ``pin_memory`` is dropped, because it only makes copies to a GPU faster.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        if positional is not None and len(args) > positional and _names_cuda(args[positional]):
            args = (*args[:positional], _CPU, *args[positional + 1 :])
        return function(*args, **kwargs)

    return call


def _alias_entry_points() -> None:
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    # `with torch.device(...)` builds a table of factory functions at its first use. Build it now, with the originals:
    # these are the functions that it intercepts, and it ignores functions that are not in its table.
    _device_constructors()
    torch.tensor = _on_cpu(torch.tensor)  # type: ignore[assignment]
    torch.as_tensor = _on_cpu(torch.as_tensor)  # type: ignore[assignment]
    tensor.new_tensor = _on_cpu(tensor.new_tensor)
    tensor.to = _on_cpu(tensor.to, positional=1)
    module.to = _on_cpu(module.to, positional=1)
    tensor.cuda = lambda self, *args, **kwargs: self
    module.cuda = lambda self, device=None: self


class _TypeName(str):
    """The text "torch.FloatTensor", which also equals "torch.cuda.FloatTensor"."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str.__eq__(self, other.replace("torch.cuda.", "torch."))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _alias_type_names() -> None:
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return _TypeName(original(self))
        return original(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_name  # type: ignore[assignment,method-assign]


def _keep_sent_tensors() -> None:
    """Make gloo send an alias of a tensor, which keeps the tensor's storage alive.

    With ``deallocate_pipeline_outputs`` the interleaved schedule frees an output (it replaces its ``data``) directly
    after ``isend``. gloo reads the tensor later, in a thread, and would send wrong numbers.
    """
    original = c10d.isend

    @functools.wraps(original)
    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(tensor.detach(), *args, **kwargs)

    dist.isend = c10d.isend = isend  # P2POp compares its argument with the function in c10d


class _Works:
    """A handle that waits for several collectives."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        self._works = works

    def wait(self) -> bool:
        return all([work.wait() for work in self._works])


def _gather_one_by_one() -> None:
    """Replace gloo's gather into several buffers by one gather per buffer.

    gloo's own version, which --overlap-param-gather uses in the background, corrupts the heap within a few hundred
    calls if the caller uses tensors at the same time (torch 2.13; pytorch issue 65231, open since 2021).
    """
    group: Any = dist.ProcessGroup
    gather = getattr(group, "all_gather_single", None) or group._allgather_base  # the older name

    def gather_several(self: Any, outputs: list[Any], inputs: list[Any], options: Any = None) -> _Works:
        options = options or c10d.AllgatherOptions()
        pairs = zip(outputs, inputs, strict=True)
        return _Works([gather(self, output.view(-1), input.view(-1), options) for output, input in pairs])

    for name in ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"):
        setattr(group, name, gather_several)


def _provide_extension() -> None:
    """Provide apex's extension, which Megatron-Core imports, so that the sum needs no separate pass over the buffer."""

    def accumulate(input_TI: torch.Tensor, gradient_TO: torch.Tensor, buffer_OI: torch.Tensor) -> None:
        if gradient_TO.dtype == buffer_OI.dtype:
            buffer_OI.addmm_(gradient_TO.T, input_TI)
        else:
            buffer_OI += gradient_TO.T @ input_TI

    extension: Any = ModuleType("fused_weight_gradient_mlp_cuda")
    extension.wgrad_gemm_accum_fp32 = extension.wgrad_gemm_accum_fp16 = accumulate  # by the dtype of the buffer
    sys.modules["fused_weight_gradient_mlp_cuda"] = extension


def _import_without_compiler() -> None:
    """Import Megatron-Core with ``torch.compile`` as identity, so that its small fused functions need no compiler."""
    original = torch.compile
    torch.compile = lambda model=None, **kwargs: (lambda f: f) if model is None else model  # type: ignore[assignment]
    try:
        import megatron.core  # noqa: F401
        import megatron.core.jit

        megatron.core.jit.disable_jit_fuser()
    finally:
        torch.compile = original
