"""A GPU that computes shapes: tensors of device cuda:0 without data, on a machine that has no GPU.

Tensors on the CPU stay real. An operation that touches "cuda" goes to torch's FakeTensorMode, which knows the shape,
type and device of its result and refuses a CPU tensor beside one of the GPU. What a program reads from the GPU (an
item, a copy to the host) is 1 where it is a fraction and else 0; of a mask half is true. It is counted: on a real GPU
the host waits there until all that was queued has run.

``driver.cpp`` must have been loaded before torch. ``torch.compile`` must be off (TORCHDYNAMO_DISABLE=1).
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention.bias import CausalBias
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
_READS = ("_local_scalar_dense", "equal", "is_nonzero")
_LAUNCHES_NOTHING = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class FakeGpu(TorchDispatchMode):
    """Runs what touches "cuda" without data, and counts: ``operations`` by name, ``waits`` by place in the source.

    ``unknown_waits`` are those at lines of which ``is_known_wait`` says no.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.is_known_wait: Callable[[FrameType], bool] = lambda frame: True
        self.unknown_waits: set[str] = set()
        self.shapes = FakeTensorMode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            return self._communicate(func, name, args, tensors)
        if not any(map(on_gpu, tensors)) and not is_gpu(kwargs.get("device")):
            kwargs.pop("pin_memory", None)
            return args[0] if name in ("pin_memory", "_pin_memory") else func(*args, **kwargs)
        if not func.is_view and func.namespace != "prim" and name not in _LAUNCHES_NOTHING:
            self.operations[name] += 1
        if name in _READS:
            self.wait(name)
            return _content((), tensors[0].dtype).item() if name == "_local_scalar_dense" else False
        if name == "masked_select":
            self.wait(name)
            return args[0].new_empty(args[0].numel() // 2)
        if name == "copy_" and not on_gpu(args[0]):
            self._copy(name, args[1], args[0].device, args, kwargs)
            return args[0].copy_(_content(args[0].shape, args[0].dtype))
        if name in ("copy_", "_to_copy"):
            source, target = (args[1], args[0].device) if name == "copy_" else (args[0], kwargs.get("device"))
            self._copy(name, source, target, args, kwargs)
        with self.shapes:
            args, kwargs = tree_map_only(torch.Tensor, _without_data, (args, kwargs))
            result = func(*args, **kwargs)
        return tree_map_only(FakeTensor, _as_host_memory, result)

    def _copy(self, name: str, source: torch.Tensor, target: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A copy from or to the host waits unless told not to."""
        asynchronous = kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
        if target is not None and on_gpu(source) != is_gpu(target) and not asynchronous:
            self.wait(name)

    def _communicate(self, func: Any, name: str, args: Any, tensors: list[torch.Tensor]) -> Any:
        """Every buffer keeps its content, of which there is none."""
        if name == "barrier":
            self.wait(name)
        elif not all(map(on_gpu, tensors)):
            raise RuntimeError(f"nccl cannot carry a tensor of the CPU: {name}, {[str(t.device) for t in tensors]}")
        self.operations[name] += 1
        work = FakeWork().boxed()
        return (args[0], work) if len(func._schema.returns) == 2 else work

    def wait(self, reason: str) -> None:
        """The host waits for the GPU here; record the line of the program that leads to it."""
        frame: Any = sys._getframe()
        known = False
        while frame.f_back is not None and any(p in frame.f_code.co_filename for p in ("/torch/", __file__, "<")):
            known |= frame.f_code.co_filename != __file__ and self.is_known_wait(frame)
            frame = frame.f_back
        place = f"{reason} at {'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}"
        self.waits[place] += 1
        if not (known or self.is_known_wait(frame)):
            self.unknown_waits.add(place)

    def forget(self) -> None:
        self.operations.clear()
        self.waits.clear()


def is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def on_gpu(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda"


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, FakeTensor):
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)


def _as_host_memory(tensor: FakeTensor) -> torch.Tensor:
    return tensor if on_gpu(tensor) else _content(tensor.shape, tensor.dtype)


def _content(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers that the host reads: losses, tokens and norms are 1, flags and other integers 0."""
    return torch.ones(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


class _Stream:
    """The one stream of the fake GPU, and every event on it."""

    priority, cuda_stream, device, device_index, device_type, stream_id = 0, 0, GPU, 0, 1, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    wait = wait_stream = wait_event = record

    def record_event(self, event: Any = None) -> _Stream:
        return event or self

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def install(gpu: FakeGpu) -> None:
    """Make torch.cuda answer as on a machine with one GPU per process, for the life of the process."""
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[method-assign,assignment]
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes a CPU tensor and copies it
    cuda: Any = torch.cuda
    stream, generator = _Stream(), torch.Generator()
    _Stream.synchronize = lambda self: gpu.wait("synchronize")  # type: ignore[attr-defined]
    cuda.is_available = cuda.is_initialized = cuda.is_bf16_supported = lambda *args: True
    cuda._lazy_init = cuda.set_device = cuda.empty_cache = cuda.set_stream = lambda *args: None
    cuda._lazy_call = lambda callback, **kwargs: callback()
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 64
    cuda.synchronize = lambda device=None: gpu.wait("synchronize")
    cuda.get_device_name = lambda device=None: "a fake GPU"
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="a fake GPU", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
    )
    cuda.max_memory_allocated = cuda.memory_allocated = cuda.memory_reserved = lambda device=None: 1 << 30
    cuda.Stream = cuda.ExternalStream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream: stream
    cuda.is_current_stream_capturing = lambda: False
    cuda.default_generators = [generator]
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *args: None)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: generator.get_state()
        module.set_rng_state = lambda state, device=None: generator.set_state(state)
        module.manual_seed = lambda seed: None
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]
    FakeTensor.tolist = lambda self: self.cpu().tolist()  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = _submit  # type: ignore[method-assign,assignment]
    CausalBias.__new__ = _plain_bias  # type: ignore[method-assign,assignment]
    _name_device()
    _stand_in_for_nccl(gpu)
    _stand_in_for_triton(gpu)


def _plain_bias(cls: type, *args: Any) -> Any:
    """A mask that is a type and two lengths; torch would have a fake tensor made into it, which cannot be."""
    with torch._C._DisableTorchDispatch():
        return torch.Tensor._make_subclass(cls, torch.empty(0))


def _submit(self: ThreadPoolExecutor, work: Any, /, *args: Any, **kwargs: Any) -> Future:
    """At once and in this thread: another one does not know of the fake GPU."""
    future: Future = Future()
    try:
        future.set_result(work(*args, **kwargs))
    except BaseException as error:
        future.set_exception(error)
    return future


def _name_device() -> None:
    """ "cuda" without a number is the current device; where C++ would ask CUDA for it, say so."""
    tensor: Any = torch.Tensor
    to = tensor.to

    def to_numbered(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        numbered = [GPU if isinstance(arg, str | torch.device) and is_gpu(arg) else arg for arg in args]
        if is_gpu(kwargs.get("device")):
            kwargs["device"] = GPU
        return to(self, *numbered, **kwargs)

    def module_to(self: torch.nn.Module, device: Any) -> torch.nn.Module:
        """A parameter that moves is a new object here, with its marks; what is on the GPU stays as it is."""
        assert is_gpu(device)
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not on_gpu(parameter):
                    moved = torch.nn.Parameter(parameter.data.to(GPU), parameter.requires_grad)
                    moved.__dict__.update(parameter.__dict__)
                    module._parameters[name] = moved
            module._buffers.update({name: to(b, GPU) for name, b in module._buffers.items() if b is not None})
        return self

    make = torch.tensor

    def make_of_items(data: Any, **kwargs: Any) -> torch.Tensor:
        """Tensors of the GPU in a list are read one by one; no memory is pinned."""
        kwargs.pop("pin_memory", None)
        return make(tree_map_only(torch.Tensor, lambda t: t.item() if on_gpu(t) else t, data), **kwargs)

    torch.tensor = make_of_items  # type: ignore[assignment]
    torch.nn.Module.to = module_to  # type: ignore[method-assign,assignment]
    tensor.to = to_numbered
    tensor.cuda = lambda self, device=None, non_blocking=False: to(self, GPU, non_blocking=non_blocking)


def _stand_in_for_nccl(gpu: FakeGpu) -> None:
    """Collectives that leave their results as they are; objects that are gathered are everyone's alike."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the backend)

    start = dist.init_process_group

    def init_process_group(backend: str, *, device_id: Any = None, timeout: Any = None, **kwargs: Any) -> None:
        assert backend == "nccl", backend
        assert device_id == GPU, f"nccl is to know its device from the start: {device_id}"
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        start("cuda:fake", timeout=timeout, store=dist.HashStore(), rank=rank, world_size=ranks)

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        gpu.wait("all_gather_object")
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj: Any, object_gather_list: list[Any] | None = None, **kwargs: Any) -> None:
        gpu.wait("gather_object")
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def scatter_object_list(
        scatter_object_output_list: list[Any], scatter_object_input_list: list[Any] | None = None, **kwargs: Any
    ) -> None:
        gpu.wait("scatter_object_list")
        scatter_object_output_list[0] = scatter_object_input_list[0] if scatter_object_input_list else None

    dist.init_process_group = init_process_group
    dist.all_gather_object, dist.gather_object = all_gather_object, gather_object
    dist.scatter_object_list = scatter_object_list
    dist.broadcast_object_list = lambda *args, **kwargs: gpu.wait("broadcast_object_list")


def _stand_in_for_triton(gpu: FakeGpu) -> None:
    """A launch of a kernel is counted; what it writes into has a shape already."""
    from triton.runtime.jit import JITFunction

    def launch(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not all(map(on_gpu, tensors)):
            raise RuntimeError(f"{self.__name__} gets a tensor of the CPU")
        gpu.operations[self.__name__] += 1

    JITFunction.run = launch
