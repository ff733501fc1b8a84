"""Read PyTorch's distributed checkpoints (``.metadata``, ``*.distcp``) without running code from them.

The index is a pickle; the unpickler here accepts only the index's own classes. Tensors are read with ``weights_only``;
other objects, which PyTorch would unpickle unchecked, are read only if ``weights_only`` accepts them. The state of FP8
scaling is a tensor of bytes that Transformer Engine unpickles; ``read_scales`` checks it first. A file that cannot be
read raises a ``ValueError`` that names it.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
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
# The function that loads tensors in a pickle; newer versions of Megatron-Core replace it by their own.
_LOAD_FROM_BYTES = {
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),
}


def _member(kind: Any, name: str) -> Any:
    """Return the member of an ``Enum`` that a pickle of Python 3.11.0 to 3.11.3 names by ``getattr``."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[name]
    raise pickle.UnpicklingError(f"builtins.getattr is only allowed for members of an Enum, not for {name!r}")


class _IndexUnpickler(pickle.Unpickler):
    """Reads ``.metadata``: plain containers and the classes of PyTorch's checkpoint index."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint's index")


class _ScaleUnpickler(pickle.Unpickler):
    """Reads a module's FP8 scaling: its recipe, tensors and plain values."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) in _LOAD_FROM_BYTES:
            return lambda content: torch.load(io.BytesIO(content), weights_only=True)
        if name in _SCALE_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in the state of FP8 scaling")


class SafeReader(dcp.FileSystemReader):
    """PyTorch's reader of one checkpoint; ``index`` is its index, read once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.index = _read_index(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read file by file, unlike PyTorch, so that an error can name its file."""
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        planner.load_bytes = _careful(planner.load_bytes)  # type: ignore
        for name, items in files.items():
            self._check_inside(name)
            try:
                super().read_data(replace(plan, items=items), planner)
            except Exception as error:  # truncated, missing and foreign files cause many kinds of error
                raise ValueError(f"{self.folder / name} cannot be read: {_first_line(error)}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_object(self, key: str) -> bytes:
        """Return the bytes of ``key``, an object that is no tensor, as they are."""
        self.set_up_storage_reader(self.index, True)
        place = self.storage_data[MetadataIndex(key)]
        with self._open(place.relative_path) as file:
            file.seek(place.offset)
            return file.read(place.length)

    def _open(self, name: str) -> BinaryIO:
        self._check_inside(name)
        try:
            return (self.folder / name).open("rb")
        except OSError as error:
            raise ValueError(f"{self.folder / name} cannot be read: {error.strerror}") from error

    def _check_inside(self, name: str) -> None:
        if Path(name).name != name:
            raise ValueError(f"{self.folder}: its index names {name}, a file outside of it")

    def read_slice(self, key: str, index: int | None = None) -> torch.Tensor:
        """Read tensor ``key``, or of a tensor that stacks others only the one at ``index``."""
        entry = self.index.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        start, size = [0] * len(entry.size), list(entry.size)
        if index is not None:
            start[0], size[0] = index, 1
        part = ChunkStorageMetadata(torch.Size(start), torch.Size(size))
        items = create_read_items_for_chunk_list(key, entry, [part])
        if sum(math.prod(item.lengths) for item in items) != math.prod(size):
            raise ValueError(f"{self.folder}: {key} is not complete")
        tensor = torch.empty(size, dtype=entry.properties.dtype)
        self.set_up_storage_reader(self.index, True)
        self.read_data(LoadPlan(items), _IntoTensor(tensor))
        return tensor if index is None else tensor[0]


class _IntoTensor(DefaultLoadPlanner):
    """Puts everything that is read into one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.tensor


def read_plainly(path: Path) -> Any:
    """Read a file that ``torch.save`` wrote, if it holds only tensors and plain containers; else ``ValueError``."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds, as above
        raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error


def is_scales(key: str) -> bool:
    """Return whether ``key`` names a module's FP8 scaling state, which Transformer Engine unpickles."""
    return key.rpartition(".")[2].startswith("_extra_state")  # experts append a number


def read_scales(state: torch.Tensor) -> Any:
    """Unpickle FP8 scaling state safely; None for an empty tensor, ``ValueError`` if it is damaged or unsafe."""
    if state.numel() == 0:
        return None
    try:
        return _ScaleUnpickler(io.BytesIO(state.cpu().numpy().tobytes())).load()
    except Exception as error:  # a corrupt pickle can raise any exception
        raise ValueError(_first_line(error)) from error


def cause(error: CheckpointException) -> str:
    """Describe the original error inside the exception that PyTorch's checkpointing wraps around it."""
    inner = next(iter(error.failures.values()))[0]
    return str(inner) if isinstance(inner, ValueError) else _first_line(inner)


def _read_index(folder: Path) -> Metadata:
    try:
        index = _IndexUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    except OSError as error:
        raise ValueError(f"{folder}: cannot read its index .metadata: {error.strerror}") from error
    except Exception as error:  # a corrupt pickle can raise any exception
        raise ValueError(f"{folder}: its index .metadata is corrupt: {' '.join(str(error).split())}") from error
    if not isinstance(index, Metadata):
        raise ValueError(f"{folder}: its index .metadata is corrupt: it holds a {type(index).__name__}")
    index.storage_meta = index.storage_meta or StorageMeta()
    return index


def _careful(load_bytes: Callable[[ReadItem, io.BytesIO], None]) -> Callable[[ReadItem, io.BytesIO], None]:
    def load(item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # rejects objects that would run code
        value.seek(0)
        load_bytes(item, value)

    return load


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
