"""Messages of a run: which ranks print them, and to which stream."""

import contextlib
import errno
import io
import logging
import os
import sys

import pytest

from mesh_megatron.util.terminal_log import EVERY_RANK, log_to_terminal

logger = logging.getLogger("mesh_megatron.training.anything")
LINE = "iteration 1/12 | 100% of it"


@pytest.mark.parametrize("rank", [0, 3])
def test_rank_zero_prints_messages_as_they_are(rank, capsys):
    with log_to_terminal(rank):
        logger.debug("nobody asked")
        logger.info(LINE)
        logger.info("my trace", extra=EVERY_RANK)
    captured = capsys.readouterr()
    assert captured.out == (f"{LINE}\n" if rank == 0 else "") + "my trace\n"
    assert captured.err == ""


def test_every_rank_prints_warnings_with_its_number(capsys):
    for rank in (0, 3):
        with log_to_terminal(rank):
            logger.warning(LINE)
    assert capsys.readouterr() == ("", f"WARNING: {LINE}\nWARNING: rank 3: {LINE}\n")


def test_levels(capsys):
    for level in (logging.DEBUG, logging.WARNING, logging.ERROR):
        with log_to_terminal(0, level):
            logger.debug(f"debug at {level}")
            logger.info(f"info at {level}")
            logger.warning(f"warning at {level}")
    assert capsys.readouterr() == ("debug at 10\ninfo at 10\n", "WARNING: warning at 10\nWARNING: warning at 30\n")


def test_no_message_is_printed_twice_or_after_the_run(capsys, monkeypatch):
    root = logging.StreamHandler()  # Megatron-Core gives the root logger one
    monkeypatch.setattr(logging.getLogger(), "handlers", [root])
    with log_to_terminal(0):
        root.setStream(sys.stderr)
        logger.warning("once")
    assert capsys.readouterr().err == "WARNING: once\n"
    logger.warning("afterwards")
    assert capsys.readouterr().err == "afterwards\n"  # the root's, as before the run


class Full(io.StringIO):
    """A log file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_messages_that_cannot_be_written_are_dropped():
    with contextlib.redirect_stdout(Full()), contextlib.redirect_stderr(Full()), log_to_terminal(0):
        logger.info(LINE)
        logger.warning(LINE)
