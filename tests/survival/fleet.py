"""Ranks that run pretrain_mesh.py's main as torchrun would start them, but forked from a process that has imported it.

They are processes that can be killed and signalled; what they print goes to a file each.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rank_pool import ROOT, free_port

PATIENCE_SECONDS = 400.0


class Fleet:
    """``ranks`` processes with the same flags; a context manager that kills those left at its end."""

    def __init__(
        self, ranks: int, flags: Sequence[object], folder: Path, before: Callable[[int], None] | None = None
    ) -> None:
        """``before(rank)``, which must be picklable, runs in each process before main and injects faults."""
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rank_preload"])
        os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        port = free_port()
        self.logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
        self._processes: list[Any] = []
        for rank, log in enumerate(self.logs):
            arguments = (rank, ranks, port, [str(flag) for flag in flags], log, before)
            self._processes.append(context.Process(target=_rank, args=arguments))
            self._processes[-1].start()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for process in self._processes:
            process.join()

    def kill(self, *ranks: int) -> None:
        """Send SIGKILL to these ranks, or to all, but not to processes that they have started."""
        for process in [self._processes[rank] for rank in ranks] if ranks else self._processes:
            process.kill()

    def signal(self, rank: int, number: signal.Signals, group: bool = False) -> None:
        """Send a signal to one rank, or to its process group as torchrun does."""
        (os.killpg if group else os.kill)(self._processes[rank].pid, number)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def running(self) -> bool:
        """True if any rank is running."""
        return any(process.exitcode is None for process in self._processes)

    def output(self, rank: int) -> str:
        return self.logs[rank].read_text(errors="replace") if self.logs[rank].exists() else ""

    def wait_for(self, text: str, rank: int = 0) -> None:
        """Wait until a rank has printed ``text``."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.output(rank):
            alive = self._processes[rank].exitcode is None
            assert alive and time.monotonic() < deadline, (
                f"{text!r} was not printed, alive: {alive}\n{self.output(rank)[-3000:]}"
            )
            time.sleep(0.01)

    def wait_for_steps(self, count: int) -> None:
        """Wait until rank 0 has logged ``count`` steps, or any rank has ended."""
        while self.output(0).count("| grad norm ") < count and all(p.exitcode is None for p in self._processes):
            time.sleep(0.01)

    def first_exit_codes(self) -> list[int | None]:
        """Wait until one rank has failed or all have ended; return all exit codes, None for ranks that still run."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            codes = [process.exitcode for process in self._processes]
            if any(codes) or None not in codes:
                return codes
            multiprocessing.connection.wait([p.sentinel for p in self._processes if p.exitcode is None], 1.0)
        raise AssertionError("still running\n" + "\n".join(map(self.output, range(len(self.logs)))))

    def killed(self) -> bool:
        """Wait until a rank was killed (return True) or all have succeeded (return False)."""
        codes = self.first_exit_codes()
        deadline = time.monotonic() + 20  # a rank that fails because another was killed may end first
        while any(codes) and -signal.SIGKILL not in codes and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [process.exitcode for process in self._processes]
        died = -signal.SIGKILL in codes
        assert died or not any(codes), f"{codes}\n" + "\n".join(map(self.output, range(len(self.logs))))
        return died

    def end(self, seconds: float) -> None:
        """Send SIGTERM to every rank's process group, then SIGKILL to those that remain, as torchrun does."""
        for process in self._processes:
            try:
                if process.exitcode is None:
                    os.killpg(process.pid, signal.SIGTERM)
            except ProcessLookupError:  # it has no process group yet, or has just ended
                process.terminate()
        for process in self._processes:
            process.join(seconds)
        self.kill()

    def exit_codes(self) -> list[int]:
        """Wait until all ranks have ended and return their exit codes; a negative code is a signal."""
        for process in self._processes:
            process.join(PATIENCE_SECONDS)
            assert process.exitcode is not None, "still running\n" + "\n".join(
                self.output(rank)[-2000:] for rank in range(len(self.logs))
            )
        return [process.exitcode for process in self._processes]


def _rank(rank: int, ranks: int, port: int, flags: list[str], log: Path, before: Callable[[int], None] | None) -> None:
    import torch

    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a launcher starts
    torch.set_num_threads(1)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    if ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 1
    try:
        import pretrain_mesh

        if before is not None:
            before(rank)
        code = pretrain_mesh.main(flags)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)  # as a process that ends; the fork server's clean-up is not ours
