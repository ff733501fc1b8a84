"""Output streams that never end a run: text is dropped if the terminal or log file cannot be written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class LossyStream:
    """A text stream that drops text which cannot be written, for example because the disk is full."""

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
    """Make ``print`` to stdout and stderr drop text that cannot be written instead of raising ``OSError``."""
    with contextlib.redirect_stdout(LossyStream(sys.stdout)), contextlib.redirect_stderr(LossyStream(sys.stderr)):  # type: ignore[type-var]
        yield
