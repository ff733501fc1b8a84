"""Reading a distributed checkpoint through Megatron-Core, without unpickling what lies in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch.distributed.checkpoint.api import CheckpointException

from mesh_megatron.checkpoint.safe_unpickling import SafeReader, cause, is_scales, read_plainly, read_scales
from mesh_megatron.parallel.collectives import first_failure

_CHOICE = "_get_filesystem_reader"


@contextmanager
def reading_with(reader: Callable[[Path], Any]) -> Iterator[None]:
    """Inside, Megatron-Core reads checkpoints with ``reader(folder)``.

    Its own choice is PyTorch's, which unpickles the index and other objects, and any code in them, as they are. As of
    0.19.2, where two modules choose one.
    """

    def choose(folder: str | Path, *args: Any, **kwargs: Any) -> Any:
        return reader(Path(folder))

    with ExitStack() as patches:
        for module in (torch_strategies, serialization):
            if hasattr(module, _CHOICE):
                patches.enter_context(patch.object(module, _CHOICE, choose))
        yield


def open_checkpoint(checkpoint: Path) -> SafeReader:
    """What each rank reads for itself, before they read tensors together; all ranks raise if one cannot."""
    failure = reader = None
    try:
        reader = SafeReader(checkpoint)
        if (common := checkpoint / "common.pt").exists():
            read_plainly(common)  # as Megatron-Core will read it only if the environment allows
    except (ValueError, OSError) as error:
        failure = str(error)
    stop_reading_if_any(failure)
    assert reader is not None
    return reader


def stop_reading_if_any(failure: str | None) -> None:
    if (reason := first_failure(failure)) is not None:
        raise ValueError(f"{reason}; another checkpoint can be named with --ckpt-step")


def read_sharded(request: dict[str, Any], checkpoint: Path, reader: SafeReader) -> dict[str, Any]:
    failure = None
    try:
        with reading_with(lambda folder: reader):
            loaded = dist_checkpointing.load(request, str(checkpoint), validate_access_integrity=False)
    except CheckpointException as error:
        failure = cause(error) if error.failures else "reading failed"
    except ValueError as error:
        failure = str(error)
    stop_reading_if_any(failure)
    return loaded


def foreign_scales(loaded: dict[str, Any], checkpoint: Path) -> str | None:
    """What is wrong with the quantisation state: loading it into a module unpickles it."""
    for entries in loaded.values():
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if is_scales(key) and isinstance(value, torch.Tensor):
                try:
                    read_scales(value)
                except ValueError as error:
                    return f"{checkpoint}: {key} cannot be read: {error}"
    return None


def without_missing_scales(chunks: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """What to ask a checkpoint that holds ``keys`` for: FP8 scaling starts anew where the run before had none."""
    if not any(is_scales(key) for chunk in chunks.values() for key in chunk):
        return chunks
    known = {key.rpartition("/shard_")[0] or key for key in keys}
    return {
        name: {key: entry for key, entry in chunk.items() if not is_scales(key) or entry.key in known}
        for name, chunk in chunks.items()
    }
