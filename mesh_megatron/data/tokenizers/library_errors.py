"""The one place that knows how tokenizer libraries fail: each has exceptions of its own, and Rust's are not even
``Exception``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_RUST_PANIC = "PanicException"  # pyo3_runtime's, a BaseException that cannot be imported


@contextmanager
def as_value_error(what: str = "") -> Iterator[None]:
    """Let whatever a library raises be a ``ValueError``, with ``what`` before its message; not what ends a process
    (Ctrl-C, no memory)."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, MemoryError) or not (isinstance(error, Exception) or type(error).__name__ == _RUST_PANIC):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what}: {message}" if what else message) from error
