"""A pool of ranks: processes that have torch and Megatron-Core imported and wait for something to run together.

Importing both takes a process seconds. Here one process does it (Python's fork server) and the ranks are its forks,
new ones for every job: something in torch or Megatron-Core always keeps a few of a job's process groups alive, and a
gloo group whose peers are gone spins.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import mesh_megatron

Result = TypeVar("Result")
ROOT = Path(mesh_megatron.__file__).parents[1]


class RankPool:
    """Runs functions on gloo ranks of this machine; a context manager, for the ranks end with it."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._ranks: list[tuple[Any, Connection]] = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, world_size: int, function: Callable[..., Result], *args: Any, timeout: float = 600) -> list[Result]:
        """``function(*args)`` on ranks 0..world_size-1 at once; its results in the order of ranks.

        ``function`` and everything in ``args`` and the results must pickle. A rank that raises fails the call with
        its traceback; so does one that takes longer than ``timeout`` seconds.
        """
        self._start(world_size)
        try:
            return self._collect(world_size, function, args, timeout)
        finally:
            self._stop()

    def _collect(self, world_size: int, function: Callable[..., Result], args: tuple, timeout: float) -> list[Result]:
        port = free_port()
        for _, connection in self._ranks:
            connection.send((world_size, port, function, args))
        pending = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        results: dict[int, Any] = {}
        while pending:
            ready = wait(list(pending), timeout)
            if not ready:
                raise TimeoutError(f"ranks {sorted(pending.values())} of {world_size} still ran after {timeout} s")
            for connection in ready:
                rank = pending.pop(connection)  # type: ignore[index]
                try:
                    done, value = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    done, value = False, "the process died"
                if not done:
                    raise RuntimeError(f"rank {rank} of {world_size} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world_size)]

    def _start(self, world_size: int) -> None:
        self._context.set_forkserver_preload(["rank_preload"])
        os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
        for rank in range(world_size):
            ours, theirs = self._context.Pipe()
            # No daemon: saving a checkpoint starts processes of its own. A rank ends when our end of its pipe does.
            process = self._context.Process(target=_serve, args=(rank, theirs))
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _stop(self) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks = []


def free_port() -> int:
    """A port that nobody listens on, below those the kernel picks, for it may give one of them away at any moment."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return port


def _serve(rank: int, connection: Connection) -> None:
    import rank_preload  # noqa: F401  (the fork server has it already)
    import torch
    import torch.distributed as dist

    from mesh_megatron.parallel.groups import stop_model_parallel
    from mesh_megatron.platform import device

    torch.set_num_threads(1)
    try:
        world_size, port, function, args = connection.recv()
    except EOFError:
        return
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        device.start_process_group()
        result = function(*args)
        stop_model_parallel()
        dist.destroy_process_group()
    except BaseException:
        connection.send((False, traceback.format_exc()))
    else:
        connection.send((True, result))
