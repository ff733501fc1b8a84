"""Decompress a source as the format's command-line tool does: every stream of a file, and an error where the tool
reports one."""

from __future__ import annotations

import bz2
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol

import zstandard

from mesh_megatron.data.preprocessing.sources import STDIN, Source

PIECE = 1 << 14  # compressed bytes per call: bounds the memory that a few bytes can grow to
_GZIP_MAGIC = b"\x1f\x8b"
_XZ_MAGIC = b"\xfd7zXZ\0"
_BZIP2_MAGIC = re.compile(rb"BZh[1-9]")


class DamagedError(Exception):
    """Raised for a compressed file that its command-line tool refuses."""


class Readable(Protocol):
    def read(self, size: int, /) -> bytes:
        """Return some bytes, none at the end."""
        ...


class Compressed:
    """The decompressed bytes of all streams of a compressed file, concatenated.

    ``read`` first returns everything before the damage, then raises ``DamagedError``. ``ignored`` counts the bytes
    after the last stream that are not a stream and that the format's tool skips with a warning.
    """

    def __init__(self, raw: IO[bytes], suffix: str) -> None:
        self.raw, self.ignored = raw, 0
        self._rest = b""  # read, not yet decompressed
        self.start = self.head(len(_XZ_MAGIC))
        self._decompressor, self._another = _FORMATS[suffix]
        self._pieces, self._ready = self._decompress(), bytearray()
        self._damage: DamagedError | None = None

    def read(self, size: int, /) -> bytes:
        """Return ``size`` bytes, fewer only before the end or damage."""
        while len(self._ready) < size and self._damage is None:
            try:
                piece = next(self._pieces, b"")
            except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
                self._damage = DamagedError(str(error))
                break
            if not piece:
                break
            self._ready += piece
        data = bytes(self._ready[:size])
        del self._ready[:size]
        if self._damage is not None and not data:
            raise self._damage
        return data

    def _decompress(self) -> Iterator[bytes]:
        while True:
            stream = self._decompressor(self)
            while not stream.eof:
                data = self._rest or self.raw.read(PIECE)
                self._rest = b""
                if not data:
                    raise EOFError("the compressed file ends in the middle of a stream")
                if piece := _decompressed(stream, data):
                    yield piece
            self._rest = stream.unused_data
            if not self._another(self):
                return

    def head(self, size: int) -> bytes:
        """Return the next ``size`` bytes of the file, fewer at its end, without consuming them."""
        while len(self._rest) < size and (data := self.raw.read(PIECE)):
            self._rest += data
        return self._rest[:size]

    def skip_zeros(self) -> int:
        """Skip zero bytes and return their number."""
        count = 0
        while self.head(1) == b"\0":
            kept = self._rest.lstrip(b"\0")
            count, self._rest = count + len(self._rest) - len(kept), kept
        return count

    def ignore_rest(self) -> bool:
        """Skip and count the remaining bytes; return False, as no stream follows."""
        while data := self._rest or self.raw.read(PIECE):
            self.ignored, self._rest = self.ignored + len(data), b""
        return False


def _decompressed(stream: Any, data: bytes) -> bytes:
    try:
        return stream.decompress(data)
    except OSError as error:  # what bz2 raises for damage
        raise EOFError(str(error)) from error


def _another_gzip(file: Compressed) -> bool:
    """Return whether another member follows. Zero bytes may pad a file (to tape blocks); other bytes are ignored."""
    padded, head = file.skip_zeros(), file.head(len(_GZIP_MAGIC))
    if not head or head == _GZIP_MAGIC:
        return bool(head)
    if len(head) == 1 and not padded:
        raise EOFError("the compressed file ends in the middle of a member's header")
    return file.ignore_rest()


def _another_bzip2(file: Compressed) -> bool:
    """Return whether the bytes that follow start like a stream; other bytes are ignored."""
    head = file.head(4)
    if not head or _BZIP2_MAGIC.match(head + b"BZh9"[len(head) :]):
        return bool(head)
    return file.ignore_rest()


def _another_xz(file: Compressed) -> bool:
    """Return whether another stream follows, after zero bytes in multiples of four; the old format has one stream."""
    if file.start != _XZ_MAGIC and file.head(1):
        raise lzma.LZMAError("something follows the end of the .lzma stream")
    if file.skip_zeros() % 4:
        raise lzma.LZMAError("padding after a stream is not a multiple of four bytes")
    return bool(file.head(1))


def _xz_decompressor(file: Compressed) -> lzma.LZMADecompressor:
    """Return a decompressor for .xz and, as ``xz`` does, for the old .lzma format."""
    return lzma.LZMADecompressor(lzma.FORMAT_XZ if file.start == _XZ_MAGIC else lzma.FORMAT_AUTO)


def _zstd_decompressor(file: Compressed) -> zstandard.ZstdDecompressionObj:
    """Return a decompressor for any window that ``zstd --long=31`` writes; the library's default limit is 128 MiB."""
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


# For each suffix: makes a decompressor for the next stream, and tells whether another stream follows.
_FORMATS: dict[str, tuple[Callable[[Compressed], Any], Callable[[Compressed], bool]]] = {
    ".gz": (lambda file: zlib.decompressobj(wbits=31), _another_gzip),
    ".bz2": (lambda file: bz2.BZ2Decompressor(), _another_bzip2),
    ".xz": (_xz_decompressor, _another_xz),
    ".zst": (_zstd_decompressor, lambda file: bool(file.head(1))),
}


@contextmanager
def open_stream(source: Source) -> Iterator[tuple[Readable, IO[bytes]]]:
    """Yield (decompressed stream, underlying file, whose position shows the progress)."""
    if source.path == STDIN:
        if sys.stdin is None:
            raise ValueError("--input -: standard input is closed; pipe the documents into this command")
        yield sys.stdin.buffer, sys.stdin.buffer
        return
    with open(source.path, "rb") as raw:
        yield Compressed(raw, source.compression) if source.compression else raw, raw
