"""Make the Python of an unpacked Transformer Engine importable on a machine without CUDA.

Its layers, quantizers, recipes and optimizers are the real ones. What they call in C++ is in ``extension.py``. They see
an H100 (compute capability 9.0): Transformer Engine asks for a GPU in assertions, and nobody else is told of one.

Its wheel on PyPI holds only Python: ``pip download --no-deps -r requirements/te.txt``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed

FOLDER = "ENGINE_OF_RANKS"
"""Environment variable of ranks: the folder that holds ``transformer_engine``."""
HOPPER = SimpleNamespace(name="a CPU as an H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
UNUSED = ("transformer_engine.pytorch.onnx_extensions", "einops")
"""For export and for inference, and not installed."""


def unpack(folder: Path, target: Path) -> Path:
    """Return a folder that holds ``transformer_engine``: ``folder`` itself, or ``target`` with its wheel unpacked."""
    if (folder / "transformer_engine").is_dir():
        return folder
    wheels = sorted(folder.glob("transformer_engine-*.whl"))
    if len(wheels) != 1:
        raise FileNotFoundError(f"{folder} has {len(wheels)} files transformer_engine-*.whl: it needs one")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(target)
    return target


def install(folder: Path) -> None:
    """Have ``import transformer_engine`` find ``folder``; call it before the first import of ``megatron.core``."""
    from engine import extension

    sys.modules["transformer_engine_torch"] = extension.build()
    for name in UNUSED:
        sys.modules.setdefault(name, extension.Extension(name))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its common part then loads no libraries
    _show_a_gpu_to_the_engine()
    sys.path.append(str(folder))  # where it looks for its version
    package = folder / "transformer_engine"
    spec = importlib.util.spec_from_file_location(
        "transformer_engine", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    engine: Any = importlib.util.module_from_spec(
        spec
    )  # its __init__ would import all at once, before the CPU platform
    engine.__version__ = metadata.version("transformer_engine")
    sys.modules["transformer_engine"] = engine
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None


class _Done:
    """A collective that is over."""

    def wait(self) -> None: ...


def _show_a_gpu_to_the_engine() -> None:
    cuda: Any = torch.cuda
    is_available, is_cuda = cuda.is_available, torch.Tensor.is_cuda
    cuda.is_available = lambda: _asked_by_the_engine() or is_available()
    torch.Tensor.is_cuda = property(  # type: ignore[assignment,method-assign]
        lambda self: _asked_by_the_engine() or is_cuda.__get__(self)  # type: ignore[attr-defined]
    )
    cuda.get_device_properties = lambda device=None: HOPPER
    cuda.get_device_capability = lambda device=None: (HOPPER.major, HOPPER.minor)
    coalesce = torch.distributed._coalescing_manager
    torch.distributed._coalescing_manager = lambda *args, **kwargs: (  # gloo does one after the other
        nullcontext(_Done()) if _asked_by_the_engine() else coalesce(*args, **kwargs)
    )
    cuda.is_current_stream_capturing = lambda: False
    torch.version.cuda = "13.0"  # type: ignore[assignment]


def _asked_by_the_engine() -> bool:
    caller: Callable[..., Any] = sys._getframe
    return caller(2).f_globals.get("__name__", "").startswith("transformer_engine.")
