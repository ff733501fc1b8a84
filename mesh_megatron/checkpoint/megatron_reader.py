"""Read a distributed checkpoint through Megatron-Core, without unpickling arbitrary objects from it."""

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
    """Within this context, Megatron-Core reads checkpoints with ``reader(folder)``.

    By default it uses PyTorch's reader, which unpickles the index and other objects and so runs any code in them. As of
    Megatron-Core 0.19.2, two modules create a reader.
    """

    def choose(folder: str | Path, *args: Any, **kwargs: Any) -> Any:
        return reader(Path(folder))

    with ExitStack() as patches:
        for module in (torch_strategies, serialization):
            if hasattr(module, _CHOICE):
                patches.enter_context(patch.object(module, _CHOICE, choose))
        yield


def open_checkpoint(checkpoint: Path) -> SafeReader:
    """Read the files that each rank reads alone, before the collective loading of tensors.

    Every rank raises ``ValueError`` if any rank cannot read them.
    """
    failure = reader = None
    try:
        reader = SafeReader(checkpoint)
        if (common := checkpoint / "common.pt").exists():
            read_plainly(common)  # Megatron-Core reads it with weights_only only if the environment says so
    except (ValueError, OSError) as error:
        failure = str(error)
    stop_reading_if_any(failure)
    assert reader is not None
    return reader


def stop_reading_if_any(failure: str | None) -> None:
    """Raise ``ValueError`` on every rank if any rank passes a ``failure``."""
    if (reason := first_failure(failure)) is not None:
        raise ValueError(f"{reason}; choose another checkpoint with --ckpt-step")


def read_sharded(request: dict[str, Any], checkpoint: Path, reader: SafeReader) -> dict[str, Any]:
    """Load the sharded tensors of ``request``; a collective call. Every rank raises ``ValueError`` if one fails."""
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
    """Return why FP8 scaling state must not be loaded (a module would unpickle it), or None if all of it is safe."""
    for entries in loaded.values():
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if is_scales(key) and isinstance(value, torch.Tensor):
                try:
                    read_scales(value)
                except ValueError as error:
                    return f"{checkpoint}: {key} cannot be read: {error}"
    return None


def without_missing_scales(chunks: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """Drop requests for FP8 scaling that is not among the checkpoint's ``keys``: its scaling starts afresh."""
    if not any(is_scales(key) for chunk in chunks.values() for key in chunk):
        return chunks
    known = {key.rpartition("/shard_")[0] or key for key in keys}
    return {
        name: {key: entry for key, entry in chunk.items() if not is_scales(key) or entry.key in known}
        for name, chunk in chunks.items()
    }
