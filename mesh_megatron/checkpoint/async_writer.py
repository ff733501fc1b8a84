"""Asynchronous checkpoint writing: a forked process writes while training continues."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest, TemporalAsyncCaller

from mesh_megatron.util.processes import die_with_parent


class AsyncWriter(AsyncCallsQueue):
    """Megatron-Core's queue of asynchronous writes; each write runs in a fork of the rank."""

    def start(self, request: AsyncRequest, failures: list[str]) -> None:
        """Start ``request``. If its process cannot be started or is killed, the reason is appended to ``failures``.

        Nothing is raised here: the other ranks have started their writes and will call ``maybe_finalize_async_calls``
        together with this one, where all ranks can exchange their failures.
        """
        self._failures = failures
        self.schedule_async_request(request)

    def _get_async_caller(self) -> TemporalAsyncCaller:
        return _Caller(self._failures)


class _Caller(TemporalAsyncCaller):
    def __init__(self, failures: list[str]) -> None:
        super().__init__()
        self._failures = failures

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        try:
            write = async_req.async_fn and partial(_while_it_lives, os.getpid(), async_req.async_fn)
            super().schedule_async_call(async_req._replace(async_fn=write))
        except OSError as error:
            self.process = None  # no process to wait for
            self._failures.append(f"no process could be started to write it: {error}")

    def close(self, abort: bool = False) -> None:
        process = self.process
        super().close(abort)
        if process is not None and process.exitcode and not abort:
            how = f"killed by {signal.Signals(-process.exitcode).name}" if process.exitcode < 0 else "ended by an error"
            self._failures.append(f"the process that wrote it was {how}")


def _while_it_lives(rank: int, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Call ``write`` in a fork of the process ``rank``, and end this fork as soon as that process ends.

    A fork that outlived its rank would keep the rank's memory allocated, GPU memory included; nobody would publish what
    it writes, and the restarted rank may write to the same folder.
    """
    die_with_parent(rank)
    write(*args, **kwargs)
