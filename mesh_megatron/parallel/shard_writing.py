"""Writing a distributed checkpoint so that what fails on one rank leaves none waiting for it.

Megatron-Core tells all ranks when a rank's tensors cannot be written. But what rank 0 alone writes (``common.pt``,
``.metadata``, ``metadata.json``) may raise there while the others go on to the next collective: they wait until it
times out. As of 0.19.2. Here such failures are kept for the caller, who asks all ranks at the end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

_FORMAT = ("torch_dist", 1)


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's way of writing, with a failure to write ``.metadata`` kept in ``failures``."""

    def __init__(self, failures: list[str]) -> None:
        super().__init__(*_FORMAT)
        self.failures = failures

    def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
        writer.finish = _keeping(self.failures, writer.finish)
        return super()._get_save_and_finalize_callbacks(writer, *args)


def request_save(state: dict[str, Any], folder: Path, failures: list[str]) -> Any:
    """Plan a checkpoint and copy what must be copied; the request whose execution writes this rank's part.

    Every rank calls this. Reasons why rank 0 could not write what it alone writes are added to ``failures``, there
    and up to the end of the request. ``write_format`` remains to be called.
    """
    accepted = inspect.signature(dist_checkpointing.save).parameters
    # Newer versions would rather write in the background with a package of NVIDIA's; their own writer is still there.
    writer = {"async_strategy": "mcore"} if "async_strategy" in accepted else {}
    with _keep_failures_of_common_state(failures):
        request = dist_checkpointing.save(
            state,
            str(folder),
            _Strategy(failures),
            async_sharded_save=True,
            validate_access_integrity=True,
            **writer,
        )
    request.finalize_fns.pop()  # metadata.json, on rank 0 alone
    return request


def write_format(folder: Path) -> None:
    """``metadata.json``, by which Megatron-Core knows the folder's format; on rank 0."""
    save_config(CheckpointingConfig(*_FORMAT), str(folder))


@contextmanager
def _keep_failures_of_common_state(failures: list[str]) -> Iterator[None]:
    """Up to 0.16 what is no tensor goes into a file of rank 0's, written before the ranks plan together."""
    owner = getattr(common, "TorchCommonSaveStrategy", None)
    if owner is None:
        yield
        return
    original = owner.save_common
    owner.save_common = _keeping(failures, original)
    try:
        yield
    finally:
        owner.save_common = original


def _keeping(failures: list[str], write: Callable[..., Any]) -> Callable[..., None]:
    def attempt(*args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a failing write
            failures.append(str(error.__context__ if isinstance(error.__context__, OSError) else error))

    return attempt
