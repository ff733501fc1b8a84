"""Writing checkpoints in a process of its own, while training goes on."""

from __future__ import annotations

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest, TemporalAsyncCaller


class BackgroundWrites(AsyncCallsQueue):
    """Megatron-Core's queue of writes, each a fork of the rank."""

    def start(self, request: AsyncRequest, failures: list[str]) -> None:
        """Begin; that this rank has no room for a process is added to ``failures`` and raised nowhere.

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
            super().schedule_async_call(async_req)
        except OSError as error:
            self.process = None  # there is none to wait for
            self._failures.append(f"no process could be started to write it: {error}")
