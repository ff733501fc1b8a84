"""A listener for signals that ask a run to stop; ``callbacks/early_exit.py`` acts on them on all ranks together."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT
# A terminal and a launcher may both deliver one Ctrl-C.
SAME_KEYSTROKE_SECONDS = 1.0

logger = logging.getLogger(__name__)


class SignalListener:
    """Remembers the first of SIGTERM, SIGINT and SIGUSR1 (SLURM's early warning) that this process receives.

    A second SIGINT ends the process at once, with exit code 130. A thread listens, so that this also works while the
    main thread waits in a collective for a rank that has failed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.started = time.monotonic()
        self._last_interrupt: float | None = None
        self._read, self._written = socket.socketpair()
        self._written.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _left_to_the_thread) for number in STOPPING}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        # Forked processes hold the socket too, so closing it here would not end the thread.
        self._written.shutdown(socket.SHUT_RDWR)
        self._written.close()
        self._thread.join()
        self._read.close()

    def _listen(self) -> None:
        while numbers := self._read.recv(64):
            for number in numbers:
                if number in STOPPING:  # other signals that Python handles arrive here too
                    self._take(number)

    def _take(self, number: int) -> None:
        if self.received is None:
            self.received = number
            logger.warning(
                f"{signal.Signals(number).name} received: all ranks save a checkpoint after this step and stop"
            )
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._last_interrupt is not None and now - self._last_interrupt > SAME_KEYSTROKE_SECONDS:
                logger.warning("second SIGINT: stopped at once, nothing saved")
                os._exit(INTERRUPTED_EXIT_CODE)
            self._last_interrupt = now


def _left_to_the_thread(*_: object) -> None:
    """Do nothing: Python must have a handler for a signal, or ``set_wakeup_fd`` would not report it."""
