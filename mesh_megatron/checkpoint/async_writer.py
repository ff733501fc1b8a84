"""Writing checkpoints in a process of its own, while training goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest, TemporalAsyncCaller

from mesh_megatron.util.processes import die_with_parent


class AsyncWriter(AsyncCallsQueue):
    """Megatron-Core's queue of writes, each a fork of the rank."""

    def start(self, request: AsyncRequest, failures: list[str]) -> None:
        """Begin. That no process could be started, or that it was killed, is added to ``failures`` and raised nowhere.

        The other ranks have begun and will meet this one in ``maybe_finalize_async_calls``, where all can learn it.
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
            self.process = None  # there is none to wait for
            self._failures.append(f"no process could be started to write it: {error}")

    def close(self, abort: bool = False) -> None:
        process = self.process
        super().close(abort)
        if process is not None and process.exitcode and not abort:
            how = f"killed by {signal.Signals(-process.exitcode).name}" if process.exitcode < 0 else "ended by an error"
            self._failures.append(f"the process that wrote it was {how}")


def _while_it_lives(rank: int, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """``write`` in a fork of the process ``rank``, which ends with it: it holds the rank's memory, on a GPU too.

    Nobody would publish what it goes on to write, and the rank that is started next may write to the same disk.
    """
    die_with_parent(rank)
    write(*args, **kwargs)
