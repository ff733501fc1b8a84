"""What the run prints is worth less than the run: a terminal or log file that cannot be written stops nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class LossyStream:
    """A text stream that drops what cannot be written, as when the disk that holds the log is full."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lossy_output() -> Iterator[None]:
    """Within, ``print`` does not raise for want of room, to stdout or stderr."""
    with contextlib.redirect_stdout(LossyStream(sys.stdout)), contextlib.redirect_stderr(LossyStream(sys.stderr)):  # type: ignore[type-var]
        yield
