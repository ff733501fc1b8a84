"""Convert the exceptions of tokenizer libraries: each has its own types, and Rust panics are not ``Exception``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_RUST_PANIC = "PanicException"  # pyo3_runtime's, a BaseException that cannot be imported


@contextmanager
def as_value_error(what: str = "") -> Iterator[None]:
    """Convert whatever a library raises to a ``ValueError`` with ``what`` before its message, except exceptions that
    end a process (Ctrl-C, out of memory)."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, MemoryError) or not (isinstance(error, Exception) or type(error).__name__ == _RUST_PANIC):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what}: {message}" if what else message) from error
