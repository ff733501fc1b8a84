"""The terminal as the place of a run's messages: modules call ``logging``, and the ranks of a run share one format."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

EVERY_RANK = {"every_rank": True}
"""``extra`` of a message that each rank prints, not only rank 0."""


class _Terminal(logging.Handler):
    """Prints warnings of every rank to stderr, and other messages of rank 0 to stdout as they are.

    A message that cannot be written, for example to a log file on a full disk, is dropped: it must not end a run.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        with contextlib.suppress(OSError):
            if record.levelno >= logging.WARNING:
                sender = f"rank {self._rank}: " if self._rank else ""
                print(f"{record.levelname}: {sender}{text}", file=sys.stderr, flush=True)
            elif self._rank == 0 or hasattr(record, "every_rank"):
                print(text, flush=True)


@contextlib.contextmanager
def log_to_terminal(rank: int, level: int = logging.INFO) -> Iterator[None]:
    """Print this package's messages of at least ``level`` inside the context."""
    logger = logging.getLogger("mesh_megatron")
    before = logger.level, logger.propagate
    terminal = _Terminal(rank)
    logger.addHandler(terminal)
    logger.setLevel(level)
    logger.propagate = False  # libraries give the root logger handlers, which would print everything twice
    try:
        yield
    finally:
        logger.removeHandler(terminal)
        logger.setLevel(before[0])
        logger.propagate = before[1]
