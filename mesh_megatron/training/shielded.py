"""Processes that a rank starts for itself, out of reach of the signals that ask the rank to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from mesh_megatron.training.signals import STOPPING


@contextmanager
def shielded_children() -> Iterator[None]:
    """Processes that this thread starts within do not receive SIGTERM, SIGINT and SIGUSR1, now or later.

    A warning often goes to a whole process group or tree: torchrun, SLURM and terminals send it so. The rank answers it
    with a checkpoint, and writes that with the help of such processes (Megatron-Core starts one with the first
    checkpoint and keeps it), so it must not kill them. They end when the rank tells them to, or by SIGKILL.
    """
    # What a process blocks is inherited by its children, also through exec; handlers are not.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        resource_tracker.ensure_running()  # multiprocessing starts it with the first process, and lifts the block then
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
