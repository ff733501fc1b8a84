"""Bytes of a source, decompressed; a file that ends too early says so."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Protocol

import zstandard

from mesh_megatron.data.sources import STDIN, Source

# What the libraries raise for a damaged file.
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError)


class Readable(Protocol):
    def read(self, size: int, /) -> bytes:
        """Some bytes, nothing at the end."""
        ...


class _Zstd:
    """Frames of a .zst one after the other; unlike the library's reader, a cut-off last frame is an ``EOFError``."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self.frame: zstandard.ZstdDecompressionObj | None = None
        self.pending = b""

    def read(self, size: int, /) -> bytes:
        while True:
            data = self.pending or self.raw.read(max(1, size // 4))
            self.pending = b""
            if not data:
                if self.frame is not None:
                    raise EOFError("compressed file ended before its last frame did")
                return b""
            if self.frame is None:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
            out = self.frame.decompress(data)
            if self.frame.eof:
                self.pending, self.frame = self.frame.unused_data, None
            if out:
                return out


class _Bz2:
    """As the library's reader, which reports damage as a bare ``OSError``."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.file = bz2.BZ2File(raw)

    def read(self, size: int, /) -> bytes:
        try:
            return self.file.read(size)
        except OSError as error:
            if error.errno is not None:
                raise
            raise EOFError(str(error)) from error


@contextmanager
def open_stream(source: Source) -> Iterator[tuple[Readable, IO[bytes]]]:
    """(decompressed stream, the file beneath it, whose position tells the progress)"""
    if source.path == STDIN:
        yield sys.stdin.buffer, sys.stdin.buffer
        return
    with open(source.path, "rb") as raw:
        if source.compression == ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream, raw
        elif source.compression == ".xz":
            with lzma.LZMAFile(raw) as stream:
                yield stream, raw
        elif source.compression == ".bz2":
            yield _Bz2(raw), raw
        elif source.compression == ".zst":
            yield _Zstd(raw), raw
        else:
            yield raw, raw
