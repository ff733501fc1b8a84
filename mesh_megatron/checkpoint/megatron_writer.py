"""Writing a distributed checkpoint so that what fails on one rank leaves none waiting for it.

Megatron-Core tells all ranks when a rank's tensors cannot be written. But what rank 0 alone writes (``common.pt``,
``.metadata``, ``metadata.json``) may raise there while the others go on to the next collective: they wait until it
times out. As of 0.19.2. Here such failures are kept for the caller, who asks all ranks at the end.
"""

from __future__ import annotations

import inspect
import pickle
import queue
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

_FORMAT = ("torch_dist", 1)


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's way of writing, with a failure to write ``.metadata`` kept in ``failures``.

    Tensors of a GPU are copied into ordinary memory. Into pinned memory, as Megatron-Core would have it, is no copy: a
    fork shares that with this process, which uses it again while the fork still writes (Megatron-LM 2288).

    Files are written by threads. Up to 0.16 Megatron-Core forks a process for each and waits for ever for one that was
    killed, as for want of memory.
    """

    def __init__(self, failures: list[str]) -> None:
        super().__init__(*_FORMAT)
        self.failures = failures

    def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
        writer.finish = _keeping(self.failures, writer.finish)
        request = super()._get_save_and_finalize_callbacks(writer, *args)
        if request.async_fn is None:
            return request
        return request._replace(
            async_fn=partial(_write_in_threads, *request.async_fn.args),
            preload_fn=partial(writer.preload_tensors, writer.write_buckets, non_blocking=False),
        )


def _write_in_threads(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Mailbox) -> None:
    """Each of ``buckets`` to its file, all at once; into ``results`` what was written, or an error instead."""
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
    done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    begun: queue.Queue[int] = queue.Queue()  # of which it takes one when it is through
    submitted = []
    with ThreadPoolExecutor(len(buckets)) as pool:
        for number, bucket in enumerate(buckets):
            begun.put(number)
            submitted.append(
                pool.submit(write, transforms, number, bucket, done, begun, use_fsync=True, use_msc=use_msc)
            )
    for attempt in submitted:
        attempt.result()
    written = dict(done.get_nowait() for _ in buckets)
    errors = [entry for entry in written.values() if isinstance(entry, Exception)]
    results.put(errors[0] if errors else written)


def request_save(state: dict[str, Any], folder: Path, failures: list[str], validate: bool = True) -> Any:
    """Plan a checkpoint and copy what must be copied; the request whose execution writes this rank's part.

    Every rank calls this. ``validate`` has every rank look whether all ranks' parts make a whole; once a run is enough,
    and with a thousand ranks it takes seconds. Reasons why rank 0 could not write what it alone writes are added to
    ``failures``, there and up to the end of the request. ``write_format`` remains to be called.
    """
    if not isinstance(filesystem_async._results_queue, Mailbox):
        filesystem_async._results_queue = Mailbox()
    accepted = inspect.signature(dist_checkpointing.save).parameters
    # Newer versions would rather write in the background with a package of NVIDIA's; their own writer is still there.
    writer = {"async_strategy": "mcore"} if "async_strategy" in accepted else {}
    with _keep_failures_of_common_state(failures):
        request = dist_checkpointing.save(
            state,
            str(folder),
            _Strategy(failures),
            async_sharded_save=True,
            validate_access_integrity=validate,
            **writer,
        )
    request.finalize_fns.pop()  # metadata.json, on rank 0 alone
    return request


def share_among_replicas(chunks: dict[str, Any], replicas: int) -> dict[str, Any]:
    """Let data-parallel ranks write in turn what all of them hold; Megatron-Core has the first one write everything.

    ``chunks`` is the sharded state of this rank's modules, ``replicas`` the number of ranks with the same parameters.
    Experts, which have replicas of their own, stay as they are.
    """
    number = 0
    for entries in chunks.values():
        for entry in entries.values():
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and getattr(entry.data, "allreduce", True):
                *others, replica = entry.replica_id
                entry.replica_id = (*others, (replica + number) % replicas)
                number += 1
    return chunks


def write_format(folder: Path) -> None:
    """``metadata.json``, by which Megatron-Core knows the folder's format; on rank 0."""
    save_config(CheckpointingConfig(*_FORMAT), str(folder))


class Mailbox:
    """What the process that writes tensors, a fork of this one, leaves for it: the last thing put, once.

    Megatron-Core has a process of its own serve a queue for that. It takes seconds to start and 280 MB, outlives a
    rank that is killed, and dies of a signal to the rank's group before the rank has saved its last checkpoint. As of
    0.19.2.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (forks share it, as long as it is open)

    def put(self, content: Any) -> None:
        self._empty()
        pickle.dump(content, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """``queue.Empty`` where nothing was put, or not all of it because the disk is full."""
        self._file.seek(0)
        try:
            content = pickle.load(self._file)  # of our own making: nobody else can write into it
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None
        self._empty()
        return content

    def _empty(self) -> None:
        self._file.seek(0)
        self._file.truncate()


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


def free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"
    except OSError as error:  # of a disk that has gone away
        return f"space unknown, {error.strerror}:"


def failure_reason(error: CheckpointException) -> str:
    """Why tensors could not be written: rank 0 knows, for all ranks."""
    return "; ".join(f"writing on rank {rank}: {_in_words(inner[0])}" for rank, inner in error.failures.items())


def _in_words(error: BaseException) -> str:
    text = str(error).removeprefix("Worker failure: ")
    return f"a file was cut short ({text})" if "unexpected pos" in text else text  # torch.save hides the system's error
