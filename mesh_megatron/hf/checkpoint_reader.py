"""Read a training checkpoint without starting Megatron: tensors one by one, on one CPU process.

A checkpoint folder is PyTorch's distributed format (``.metadata``, ``*.distcp``) with ``run_config.json`` beside it.
Its index is a pickle, so it is read by an unpickler that knows the index's own classes and nothing else; tensors are
read with ``weights_only``. No code of the checkpoint's ever runs.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from mesh_megatron.config.cli import from_dict
from mesh_megatron.config.run import RunConfig
from mesh_megatron.training.checkpoint_folder import CONFIG, TRACKER
from mesh_megatron.training.manifest import MANIFEST, find_damage

# Where a model's weights live; a checkpoint also holds optimizer and random state.
_WEIGHTS = ("embedding.", "prelude.", "core.", "coda.", "recurrence.", "final_norm.", "output_layer.")

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


class _IndexUnpickler(pickle.Unpickler):
    """Reads ``.metadata``: plain containers and the classes of PyTorch's checkpoint index."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's index")


class _SafeReader(dcp.FileSystemReader):
    """PyTorch's reader with the index read once, by ``_IndexUnpickler``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            metadata = _IndexUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
        except OSError as error:
            raise ValueError(f"--load {folder}: cannot read its index .metadata: {error.strerror}") from error
        except Exception as error:  # a broken pickle raises whatever its bytes happen to mean
            raise ValueError(f"--load {folder}: its index .metadata is corrupt: {error}") from error
        if not isinstance(metadata, Metadata):
            raise ValueError(f"--load {folder}: its index .metadata is corrupt: it holds a {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        self.index: Metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


class CheckpointReader:
    """One checkpoint: its run's settings, and its tensors by name.

    ``config`` is the run's ``RunConfig``, ``resolved`` what training worked out (padded vocabulary, iteration,
    consumed tokens, end of document), ``shapes`` the weights' shapes by checkpoint key.
    """

    def __init__(self, load: Path, iteration: int | None = None) -> None:
        self.folder = find_checkpoint(load, iteration)
        if (self.folder / MANIFEST).exists() and (damage := find_damage(self.folder)):
            raise ValueError(f"--load {self.folder} is not whole: {', '.join(damage)}")
        self.config, self.resolved = read_run_config(self.folder)
        self._reader = _SafeReader(self.folder)
        entries = self._reader.index.state_dict_metadata.items()
        self._entries = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self.shapes = {key: tuple(entry.size) for key, entry in self._entries.items() if key.startswith(_WEIGHTS)}

    def dtype(self, key: str) -> torch.dtype:
        """What the checkpoint holds ``key`` in."""
        return self._entries[key].properties.dtype

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors named ``keys``, whole and on the CPU, whatever ranks wrote their parts."""
        tensors = {}
        for key in keys:
            if key not in self._entries:
                raise ValueError(f"--load {self.folder}: it holds no tensor {key}")
            entry = self._entries[key]
            tensors[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            with without_process_group():
                dcp.load(tensors, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:  # truncated and missing files surface as many kinds of error inside
            raise ValueError(f"--load {self.folder}: cannot read {', '.join(tensors)}: {_cause(error)}") from error
        return tensors


def find_checkpoint(load: Path, iteration: int | None = None) -> Path:
    """The folder ``iter_NNNNNNN`` of ``iteration`` (default the newest) in ``load``, or ``load`` if it is one."""
    if not load.is_dir():
        raise ValueError(f"--load {load}: no such folder")
    if (load / ".metadata").exists():
        return load
    if iteration is None:
        tracker = load / TRACKER
        if not tracker.exists():
            raise ValueError(f"--load {load}: no checkpoint there (neither {TRACKER} nor .metadata)")
        text = tracker.read_text().strip()
        if not text.isdigit():
            raise ValueError(f"--load {load}: {TRACKER} holds {text!r} instead of an iteration; give --iteration")
        iteration = int(text)
    folder = load / f"iter_{iteration:07d}"
    if not folder.is_dir():
        found = ", ".join(str(int(path.name[5:])) for path in sorted(load.glob("iter_*")) if path.name[5:].isdigit())
        raise ValueError(f"--load {load}: no checkpoint of iteration {iteration}; there are {found or 'none'}")
    return folder


def read_run_config(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """``run_config.json`` of a checkpoint: the run's settings, and what was worked out from them."""
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        resolved = content.pop("resolved")
    except OSError as error:
        raise ValueError(f"--load {folder}: cannot read {CONFIG}: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"--load {folder}: {CONFIG} is corrupt: {error}") from error
    return from_dict(RunConfig, content, str(path)), resolved


@contextmanager
def without_process_group() -> Iterator[None]:
    """Silence PyTorch's warning that a checkpoint is read or written by one process: here it always is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: CheckpointException) -> str:
    """What went wrong, out of the wrapper that PyTorch's checkpointing puts around it."""
    inner = next(iter(error.failures.values()))[0]
    return f"{type(inner).__name__}: {inner}".splitlines()[0].rstrip(": ")
