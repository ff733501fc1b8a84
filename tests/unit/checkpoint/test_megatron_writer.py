"""Results that the writers of a checkpoint leave for their rank."""

import os
import queue

import pytest

from mesh_megatron.checkpoint.megatron_writer import Mailbox


def test_a_fork_leaves_something_and_it_is_taken_once():
    mailbox, content = Mailbox(), {"tensor": list(range(100_000))}
    for _ in range(2):
        if (pid := os.fork()) == 0:
            mailbox.put(content)
            os._exit(0)
        os.waitpid(pid, 0)
        assert mailbox.get_nowait() == content
        with pytest.raises(queue.Empty):
            mailbox.get_nowait()


def test_the_last_thing_put_replaces_what_nobody_took():
    mailbox = Mailbox()
    mailbox.put("a" * 1000)
    mailbox.put("b")
    assert mailbox.get_nowait() == "b"
