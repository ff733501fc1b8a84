"""Read a training checkpoint without starting Megatron-Core: tensor by tensor, in one CPU process.

A checkpoint folder is PyTorch's distributed format (``.metadata``, ``*.distcp``) with ``run_config.json`` beside it.
No code from the checkpoint ever runs (``checkpoint/safe_unpickling.py``).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mesh_megatron.checkpoint.folder import (
    CONFIG,
    HUGGING_FACE_CONFIG,
    TRACKER,
    folder_of,
    read_tracker,
    saved_iterations,
)
from mesh_megatron.checkpoint.manifest import MANIFEST, find_damage
from mesh_megatron.checkpoint.safe_unpickling import SafeReader, cause
from mesh_megatron.config.cli import from_dict
from mesh_megatron.config.data import DataConfig
from mesh_megatron.config.run import RunConfig

# Where a model's weights live; a checkpoint also holds optimizer and random state.
_WEIGHTS = ("embedding.", "prelude.", "core.", "coda.", "recurrence.", "final_norm.", "output_layer.")
# Settings of older versions that never had an effect: an older checkpoint still names them.
_REMOVED_SETTINGS = {"parallel": ("use_megatron_fsdp",), "data": ("reset_position_ids",)}
_GROUPS = ("resolved", *_REMOVED_SETTINGS)  # those that are read before the settings' own checks


class CheckpointReader:
    """One checkpoint: the settings of its run, and its tensors by name.

    ``config`` is the run's ``RunConfig``, ``resolved`` the values that training derived (padded vocabulary, iteration,
    consumed tokens, end of document), ``shapes`` the weights' shapes by checkpoint key, ``all_shapes`` also those of
    optimizer and random state. Raises ``ValueError`` if the checkpoint is missing or damaged.
    """

    def __init__(self, load: Path, iteration: int | None = None) -> None:
        self.folder = find_checkpoint(load, iteration)
        if (self.folder / MANIFEST).exists() and (damage := find_damage(self.folder)):
            raise ValueError(f"--load {self.folder} is not intact: {', '.join(damage)}")
        self.config, self.resolved = read_run_config(self.folder)
        self._reader = SafeReader(self.folder)
        entries = self._reader.index.state_dict_metadata.items()
        self._entries = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self.all_shapes = {key: tuple(entry.size) for key, entry in self._entries.items()}
        self.shapes = {key: shape for key, shape in self.all_shapes.items() if key.startswith(_WEIGHTS)}

    def data(self, tokenizer_model: Path | None = None) -> DataConfig:
        """Return the run's data settings; ``tokenizer_model`` replaces the path of a tokenizer that has moved."""
        settings = self.config.data
        return replace(settings, tokenizer_model=tokenizer_model or settings.tokenizer_model)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype in which the checkpoint stores ``key``."""
        return self._entries[key].properties.dtype

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read the complete tensors ``keys`` onto the CPU, however the ranks had sharded them.

        Raises ``ValueError`` for an unknown key and for missing or damaged files.
        """
        tensors = {}
        for key in keys:
            if key not in self._entries:
                raise ValueError(f"--load {self.folder}: has no tensor {key}")
            entry = self._entries[key]
            tensors[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            with without_process_group():
                dcp.load(tensors, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:  # truncated and missing files cause many kinds of error
            raise ValueError(f"--load {self.folder}: cannot read {', '.join(tensors)}: {cause(error)}") from error
        return tensors


def find_checkpoint(load: Path, iteration: int | None = None) -> Path:
    """Find the folder ``iter_NNNNNNN`` of ``iteration`` (default: the tracker's) in ``load``, or ``load`` if it is one.

    Raises ``ValueError`` if there is no such checkpoint.
    """
    if not load.is_dir():
        raise ValueError(f"--load {load}: no such folder")
    if (load / ".metadata").exists():
        if iteration is not None and load.resolve().name != folder_of(load, iteration).name:
            raise ValueError(f"--iteration {iteration}: --load {load} is another checkpoint; give one of the two")
        return load
    folder = _tracked(load) if iteration is None else folder_of(load, iteration)
    if not folder.is_dir():
        raise ValueError(f"--load {load}: no checkpoint {folder.name} there{_instead(load)}")
    return folder


def _tracked(load: Path) -> Path:
    """Return the checkpoint that the tracker of ``load`` names; ``release`` is what Megatron-LM's converter writes."""
    try:
        text = read_tracker(load)
    except ValueError as error:
        raise ValueError(f"{error}{_instead(load)}") from error
    if text is None and (load / HUGGING_FACE_CONFIG).is_file():
        raise ValueError(
            f"--load {load}: is a Hugging Face model already ({HUGGING_FACE_CONFIG}), not a training checkpoint; "
            "use it as it is, or name the folder that a run's --save named"
        )
    if text is None and (instead := _instead(load)):
        raise ValueError(f"--load {load}: no {TRACKER} there{instead}")
    if text is None:
        raise ValueError(f"--load {load}: no checkpoint there (neither {TRACKER} nor .metadata)")
    if text == "release":
        return load / text
    if not text.isdecimal():
        raise ValueError(f"--load {load}: {TRACKER} holds {text[:40]!r} instead of an iteration{_instead(load)}")
    return folder_of(load, int(text))


def _instead(load: Path) -> str:
    """Return the end of a message: the checkpoints in ``load``; empty if there are none."""
    found = [str(folder_of(load, iteration)) for iteration in saved_iterations(load)]
    return f"; give one that is there: {', '.join(found)}" if found else ""


def read_run_config(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Read ``run_config.json`` of a checkpoint: the run's settings, and the values derived from them.

    Raises ``ValueError`` if the file is missing or damaged.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        resolved = content.pop("resolved")
        groups = {"resolved": resolved, **content}
        if other := [name for name, group in groups.items() if not isinstance(group, dict) and name in _GROUPS]:
            raise ValueError(f"{other[0]} is no group of settings")
    except OSError as error:
        raise ValueError(f"--load {folder}: cannot read {CONFIG}: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"--load {folder}: {CONFIG} is corrupt: {error}") from error
    for group, names in _REMOVED_SETTINGS.items():
        for name in names:
            content.get(group, {}).pop(name, None)
    return from_dict(RunConfig, content, str(path)), resolved


@contextmanager
def without_process_group() -> Iterator[None]:
    """Silence PyTorch's warning about reading or writing a checkpoint in a single process, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
