"""Processes that a stop signal for the rank must not end."""

import multiprocessing
import os
import signal
import time

import pytest

from mesh_megatron.training.shielded import shielded_children
from mesh_megatron.training.signals import STOPPING


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_stop_signals_do_not_end_children(method):
    with shielded_children():
        child = multiprocessing.get_context(method).Process(target=time.sleep, args=(60,))
        child.start()
    blocked = {int(line.split()[1], 16) for line in open(f"/proc/{child.pid}/status") if line.startswith("SigBlk")}.pop()
    for number in STOPPING:
        os.kill(child.pid, number)
        assert blocked >> (number - 1) & 1
    assert child.is_alive()
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_the_thread_listens_again_afterwards():
    with shielded_children():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) >= set(STOPPING)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOPPING)
