"""Reading PyTorch's distributed checkpoints (``.metadata``, ``*.distcp``) without running what lies in them.

The index is a pickle: here an unpickler reads it that knows the index's own classes and nothing else. Tensors are read
with ``weights_only``; other objects, which PyTorch would unpickle as they are, only if ``weights_only`` accepts them.
The state of FP8 scaling is a tensor of bytes that Transformer Engine unpickles: ``read_scales`` looks into it first.
What cannot be read is a ``ValueError`` that names its file.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

_INDEX_CLASSES = {
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
}

_SCALE_CLASSES = {
    "collections": {"OrderedDict"},
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "transformer_engine.common.recipe": {"Format", "_FormatHelper"},
}
# Tensors in a pickle; newer versions of Megatron-Core put a function of theirs in its place.
_LOAD_FROM_BYTES = {
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Reads ``.metadata``: plain containers and the classes of PyTorch's checkpoint index."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's index")


class _ScaleUnpickler(pickle.Unpickler):
    """Reads a module's FP8 scaling: its recipe, tensors and plain values."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _LOAD_FROM_BYTES:
            return lambda content: torch.load(io.BytesIO(content), weights_only=True)
        if name in _SCALE_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into the state of FP8 scaling")


class SafeReader(dcp.FileSystemReader):
    """PyTorch's reader of one checkpoint; ``index`` is its index, read once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.index = _read_index(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As PyTorch does it, a file at a time, so that an error can name it."""
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        planner.load_bytes = _careful(planner.load_bytes)  # type: ignore
        for name, items in files.items():
            if Path(name).name != name:
                raise ValueError(f"{self.folder}: its index names {name}, a file outside of it")
            try:
                super().read_data(replace(plan, items=items), planner)
            except Exception as error:  # truncated, missing and foreign files surface as many kinds of error
                raise ValueError(f"{self.folder / name} cannot be read: {_first_line(error)}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done


def read_plainly(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain containers."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # as many kinds as above
        raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error


def is_scales(key: str) -> bool:
    """Whether a module's state of this name is what Transformer Engine keeps of FP8 scaling."""
    return key.rpartition(".")[2].startswith("_extra_state")  # experts number theirs


def read_scales(state: torch.Tensor) -> Any:
    """What the bytes hold; None of no bytes."""
    if state.numel() == 0:
        return None
    try:
        return _ScaleUnpickler(io.BytesIO(state.cpu().numpy().tobytes())).load()
    except Exception as error:  # a broken pickle raises whatever its bytes happen to mean
        raise ValueError(_first_line(error)) from error


def cause(error: CheckpointException) -> str:
    """What went wrong, out of the wrapper that PyTorch's checkpointing puts around it."""
    inner = next(iter(error.failures.values()))[0]
    return str(inner) if isinstance(inner, ValueError) else _first_line(inner)


def _read_index(folder: Path) -> Metadata:
    try:
        index = _IndexUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    except OSError as error:
        raise ValueError(f"{folder}: cannot read its index .metadata: {error.strerror}") from error
    except Exception as error:  # a broken pickle raises whatever its bytes happen to mean
        raise ValueError(f"{folder}: its index .metadata is corrupt: {' '.join(str(error).split())}") from error
    if not isinstance(index, Metadata):
        raise ValueError(f"{folder}: its index .metadata is corrupt: it holds a {type(index).__name__}")
    index.storage_meta = index.storage_meta or StorageMeta()
    return index


def _careful(load_bytes: Callable[[ReadItem, io.BytesIO], None]) -> Callable[[ReadItem, io.BytesIO], None]:
    def load(item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # refuses what would run code
        value.seek(0)
        load_bytes(item, value)

    return load


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
