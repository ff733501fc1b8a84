"""Write a distributed checkpoint so that a failure on one rank leaves no other rank waiting in a collective.

Megatron-Core reports to all ranks that a rank's tensors cannot be written. But files that only rank 0 writes
(``common.pt``, ``.metadata``, ``metadata.json``) may raise there while the other ranks enter the next collective and
wait until it times out (as of 0.19.2). Here such failures are collected; the caller exchanges them among all ranks at
the end.
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
    """Megatron-Core's save strategy; a failure to write ``.metadata`` is appended to ``failures``.

    GPU tensors are copied into pageable memory. Megatron-Core would use pinned memory, which a fork shares with this
    process, so that training would overwrite it while the fork still writes (Megatron-LM issue 2288).

    Files are written by threads. Megatron-Core up to 0.16 forks a process per file and waits forever for one that was
    killed, for instance by the out-of-memory killer.
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
    """Write each of ``buckets`` to its file, in parallel; put what was written, or an error, into ``results``."""
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
    done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    begun: queue.Queue[int] = queue.Queue()  # the writer takes one item when it has finished
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
    """Plan a checkpoint, copy what must be copied, and return the request that writes this rank's part.

    A collective call. With ``validate`` every rank checks that the parts of all ranks cover every tensor; once per run
    is enough, and with a thousand ranks it takes seconds. If rank 0 cannot write the files that only it writes, the
    reason is appended to its ``failures``, until the request ends. The caller must still call ``write_format``.
    """
    if not isinstance(filesystem_async._results_queue, Mailbox):
        filesystem_async._results_queue = Mailbox()
    accepted = inspect.signature(dist_checkpointing.save).parameters
    # Newer versions prefer a separate NVIDIA package for asynchronous writes; their own writer still exists.
    writer = {"async_strategy": "mcore"} if "async_strategy" in accepted else {}
    with _keep_failures_of_common_state(failures):
        request = dist_checkpointing.save(
            state,
            str(folder),
            _Strategy(failures),
            async_sharded_save=True,
            validate_access_integrity=validate,
            preprocess_common_before_consistancy_check=_without_chunks,
            **writer,
        )
    request.finalize_fns.pop()  # metadata.json, on rank 0 only
    return request


def _without_chunks(common: dict[str, Any]) -> dict[str, Any]:
    """Leave out what remains of a rank's modules without their tensors: nothing, for a number that ranks differ in."""
    return {name: value for name, value in common.items() if value != {}}


def share_among_replicas(chunks: dict[str, Any], replicas: int) -> dict[str, Any]:
    """Distribute the writing of replicated tensors over the data-parallel ranks, round-robin.

    By default Megatron-Core has the first replica write everything. ``chunks`` is the sharded state of this rank's
    modules, ``replicas`` the number of ranks with the same parameters. Experts have other replicas and stay unchanged.
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
    """Write ``metadata.json``, which tells Megatron-Core the folder's format; call it on rank 0."""
    save_config(CheckpointingConfig(*_FORMAT), str(folder))


class Mailbox:
    """Passes one result from the forked writer to this process: ``get_nowait`` returns the last item put, once.

    Megatron-Core starts a queue server process for that (as of 0.19.2). The server takes seconds to start and 280 MB,
    outlives a rank that is killed, and ends on a signal to the process group before the rank's last checkpoint.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (forks share it while it is open)

    def put(self, content: Any) -> None:
        self._empty()
        pickle.dump(content, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return the item; ``queue.Empty`` if none was put, or only a part of it because the disk is full."""
        self._file.seek(0)
        try:
            content = pickle.load(self._file)  # an unnamed file: only this process and its forks can write to it
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None
        self._empty()
        return content

    def _empty(self) -> None:
        self._file.seek(0)
        self._file.truncate()


@contextmanager
def _keep_failures_of_common_state(failures: list[str]) -> Iterator[None]:
    """Up to Megatron-Core 0.16, rank 0 writes the state that is not tensors before the collective planning."""
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
    """Format the free space of the disk that holds ``folder``, in GB."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"
    except OSError as error:  # the disk is no longer mounted
        return f"space unknown, {error.strerror}:"


def failure_reason(error: CheckpointException) -> str:
    """Describe why tensors could not be written, for every rank that failed."""
    return "; ".join(f"writing on rank {rank}: {_in_words(inner[0])}" for rank, inner in error.failures.items())


def _in_words(error: BaseException) -> str:
    text = str(error).removeprefix("Worker failure: ")
    return f"a file was cut short ({text})" if "unexpected pos" in text else text  # torch.save hides the system's error
