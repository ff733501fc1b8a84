"""Split sources into blocks of complete documents: small enough to bound memory, large enough to keep workers busy.

Where a file is cut depends on its content alone, so the n-th block of a source is the same in every run.
"""

from __future__ import annotations

import codecs
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from mesh_megatron.data.preprocessing.decompression import Compressed, DamagedError, Readable, open_stream
from mesh_megatron.data.preprocessing.sources import STDIN, Source

BLOCK_BYTES = 1 << 22
ROWS = 1024
SEAM = 1 << 14
BLANK = b" \t\r\n"
_NO_LIMIT = (1 << 31) - 1  # the default refuses the footer of a file with very many row groups or columns
_BETWEEN_VALUES = re.compile(r"[ \t\r\n,\[\]]*")
BLANK_LINES = re.compile(rb"\n[ \t\r\n]*\n")
TRAILING = "trailing bytes"  # a problem of a file that costs no document


class Problem(NamedTuple):
    """A document or file that cannot be used: the kind of fault, the line (row, value) in its block, details."""

    kind: str
    line: int = 0
    detail: str = ""


class FileRange(NamedTuple):
    """A range of bytes of an uncompressed file; the worker that parses it reads it."""

    path: str
    start: int
    size: int

    def read(self) -> bytes:
        with open(self.path, "rb") as stream:
            stream.seek(self.start)
            return stream.read(self.size)


@dataclass(frozen=True)
class Block:
    """Consecutive documents of a source: bytes of a text (``FileRange`` or bytes), a list of JSON values, or a pyarrow
    RecordBatch; or a problem that the reader found."""

    payload: Any
    position: int
    """Bytes of the file on disk read so far."""
    first: bool = False
    lines: int = 0
    """Lines that a problem takes up."""


@dataclass(frozen=True)
class SplitOptions:
    """Settings that split text into documents: at blank lines, every line or a separator, or one document per file."""

    separator: str = "blank-line"
    json_keys: tuple[str, ...] = ("text",)
    max_document_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if not self.separator:
            raise ValueError("--document-separator '': is empty; give blank-line, line, file or a text")

    def boundary(self, source: Source) -> re.Pattern[bytes] | None:
        """Return the pattern that ends a document of ``source``; None: the end of the file."""
        if source.format != "text" or self.separator == "line":
            return re.compile(rb"\n")
        if self.separator == "blank-line":
            return BLANK_LINES
        if self.separator == "file":
            return None
        return re.compile(re.escape(self.separator_bytes()))

    def separator_bytes(self) -> bytes:
        """Return the separator as bytes; \\n, \\t and \\r may be written as escapes."""
        text = self.separator.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r")
        return text.encode("utf-8", "surrogateescape")  # a command line may hold bytes that are not UTF-8


def read_blocks(source: Source, split_options: SplitOptions) -> Iterator[Block]:
    """Yield the blocks of one source in order."""
    if source.path != STDIN and source.size == 0:
        yield Block(Problem("empty file"), 0)
        return
    position = 0
    try:
        with open_stream(source) as (stream, raw):
            for block in _reader(source, split_options)(source, split_options, stream, raw):
                position = block.position
                yield block
            if isinstance(stream, Compressed) and stream.ignored:
                detail = f"{stream.ignored} bytes that are no {source.compression}, as its command-line tool warns too"
                yield Block(Problem(TRAILING, detail=detail), position)
    except DamagedError as error:
        yield Block(Problem("damaged file", detail=str(error)), position)


def _reader(
    source: Source, split_options: SplitOptions
) -> Callable[[Source, SplitOptions, Readable, IO[bytes]], Iterator[Block]]:
    if source.format in ("parquet", "arrow"):
        return _rows
    if source.format == "json" and not _is_json_lines(source, split_options.max_document_bytes):
        return _json_values
    return _text


def _text(source: Source, split_options: SplitOptions, stream: Readable, raw: IO[bytes]) -> Iterator[Block]:
    plain = not source.compression and source.path != STDIN
    boundary, limit = split_options.boundary(source), split_options.max_document_bytes
    buffer, start, first, dropped = bytearray(), 0, True, -1  # dropped: lines of an overlong document so far, or -1

    def block(size: int) -> Block:
        payload = FileRange(source.path, start, size) if plain else bytes(buffer[:size])
        return Block(payload, _position(source, raw), first)

    while True:
        try:
            data = stream.read(BLOCK_BYTES)
        except DamagedError:
            if dropped < 0 and (size := _last_end(boundary, buffer)):
                yield block(size)
            raise
        if not data:
            break
        buffer += data
        if dropped >= 0:
            match = boundary.search(buffer, 0, _searchable(boundary, buffer)) if boundary else None
            size = match.end() if match else max(0, len(buffer) - SEAM)  # a separator may lie across two reads
            dropped += buffer.count(b"\n", 0, size)
            start += size
            del buffer[:size]
            if not match:
                continue
            yield Block(Problem("document too long", detail=_over(limit)), _position(source, raw), lines=dropped)
            dropped, first = -1, False
        if len(buffer) < BLOCK_BYTES:
            continue
        size = _last_end(boundary, buffer)
        if size:
            yield block(size)
            first = False
            start += size
            del buffer[:size]
        elif len(buffer) > limit:
            dropped = 0
    if dropped >= 0:
        yield Block(Problem("document too long", detail=_over(limit)), _position(source, raw), lines=dropped)
    elif buffer:
        yield block(len(buffer))


def _last_end(boundary: re.Pattern[bytes] | None, buffer: bytearray) -> int:
    """Return the end of the last complete document in ``buffer``; 0 if there is none."""
    if boundary is None:
        return 0
    if boundary.pattern == b"\n":
        return buffer.rfind(b"\n") + 1
    # Blank lines match alike from wherever the search starts, and are most often near the end. Other separators may
    # overlap themselves ("--" in "---"), so they are looked for from the beginning, as the parser does.
    windows = (1 << 16, len(buffer)) if boundary is BLANK_LINES else (len(buffer),)
    end, last = 0, _searchable(boundary, buffer)
    for window in windows:
        for match in boundary.finditer(buffer, max(0, len(buffer) - window), last):
            end = match.end()
        if end:
            break
    return end


def _searchable(boundary: re.Pattern[bytes], buffer: bytearray) -> int:
    """Return up to where ``boundary`` may be searched. A run of blank lines counts only once its end is seen: a block
    must not start inside one. (A pattern with the end in it would try a run at the end from each of its lines.)
    """
    return len(buffer.rstrip(BLANK)) if boundary is BLANK_LINES else len(buffer)


def _is_json_lines(source: Source, limit: int) -> bool:
    """Return whether the first line of a .json is one complete JSON value."""
    head = b""
    with open_stream(source) as (stream, _):
        while b"\n" not in head.lstrip() and len(head) <= limit and (data := stream.read(1 << 16)):
            head += data
    line = head.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")[0]
    if not line.startswith(b"{"):
        return not line.startswith(b"[")  # of anything else the line reader names the error
    text = line.decode("utf-8", "replace")
    try:
        _, end = json.JSONDecoder(parse_int=float).raw_decode(text)
    except (json.JSONDecodeError, RecursionError):
        return line.rstrip().endswith(b"}")
    return not text[end:].lstrip(" \t\r,").startswith("{")  # a second object


def _json_values(source: Source, split_options: SplitOptions, stream: Readable, raw: IO[bytes]) -> Iterator[Block]:
    """Yield the values of a JSON array, or consecutive values over any number of lines."""
    decoder, utf8 = json.JSONDecoder(parse_int=float), codecs.getincrementaldecoder("utf-8-sig")()
    limit, text, at, held, ended, depth = split_options.max_document_bytes, "", 0, 0, False, 0
    values: list[Any] = []
    while True:
        between: Any = _BETWEEN_VALUES.match(text, at)
        at, depth = between.end(), depth + between[0].count("[") - between[0].count("]")
        try:
            value, end = decoder.raw_decode(text, at) if at < len(text) else (None, at)
        except (json.JSONDecodeError, RecursionError) as error:
            end = at
            if ended or len(text) - at > limit:
                kind = "broken JSON" if ended else "document too long"
                yield Block(values, _position(source, raw))
                yield Block(Problem(kind, detail=str(error) if ended else _over(limit)), _position(source, raw))
                return
        if end > at:
            values.append(value)
            held, at = held + end - at, end
        elif ended:
            break
        else:
            try:
                data = stream.read(max(1 << 20, len(text) - at))
                ended = not data
                text, at = text[at:] + utf8.decode(data, final=ended), 0
            except UnicodeDecodeError as error:
                yield Block(values, _position(source, raw))
                yield Block(Problem("invalid UTF-8", detail=error.reason), _position(source, raw))
                return
        if held >= BLOCK_BYTES:
            yield Block(values, _position(source, raw))
            values, held = [], 0
    yield Block(values, _position(source, raw))
    if depth > 0:
        yield Block(Problem("broken JSON", detail="an array has no end: the file is truncated"), _position(source, raw))


def _rows(source: Source, split_options: SplitOptions, stream: Readable, raw: IO[bytes]) -> Iterator[Block]:
    import pyarrow
    from pyarrow import ipc, parquet

    keys = list(split_options.json_keys)
    try:
        with _seekable(source, stream, raw) as file:
            if source.format == "parquet":
                limits = dict.fromkeys(("thrift_string_size_limit", "thrift_container_size_limit"), _NO_LIMIT)
                table = parquet.ParquetFile(file, **limits)
                rows = _rows_at_once(table.metadata, keys)
                names, batches = table.schema_arrow.names, lambda: table.iter_batches(rows, columns=keys)
            else:
                reader = _arrow_reader(ipc, file)
                names, batches = reader.schema.names, lambda: (batch.select(keys) for batch in reader)
            for key in keys:
                if key not in names:
                    yield Block(Problem("missing key", detail=f"no column {key!r}, there is {', '.join(names)}"), 0)
                    return
            for batch in batches():
                for start in range(0, batch.num_rows, ROWS):
                    for piece in _pieces(_plain(batch.slice(start, ROWS))):
                        yield Block(piece, file.tell())
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield Block(Problem("damaged file", detail=str(error).partition("\n")[0]), 0)


def _rows_at_once(metadata: Any, keys: list[str]) -> int:
    """Return how many rows of a Parquet file take about ``BLOCK_BYTES``, at most ``ROWS``."""
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    columns = [i for i, path in enumerate(paths) if f"{path}.".startswith(tuple(f"{key}." for key in keys))]
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    size = sum(group.column(index).total_uncompressed_size for group in groups for index in columns)
    return max(1, min(ROWS, BLOCK_BYTES * metadata.num_rows // max(1, size)))


def _plain(batch: Any) -> Any:
    """Return ``batch`` without dictionaries and views: a slice of those refers to the bytes of all rows."""
    import pyarrow

    def plain(column: Any) -> Any:
        if pyarrow.types.is_dictionary(column.type):
            return plain(column.dictionary_decode())
        return column.cast(pyarrow.large_string()) if pyarrow.types.is_string_view(column.type) else column

    return pyarrow.RecordBatch.from_arrays([plain(column) for column in batch.columns], batch.schema.names)


def _pieces(batch: Any) -> Iterator[Any]:
    """Halve ``batch`` until each piece has at most ``BLOCK_BYTES`` or one row. Pieces are copies, because pickling a
    slice for a worker would pickle all rows."""
    if batch.num_rows > 1 and batch.nbytes > BLOCK_BYTES:
        half = batch.num_rows // 2
        yield from _pieces(batch.slice(0, half))
        yield from _pieces(batch.slice(half))
    else:
        yield batch.take(list(range(batch.num_rows)))


def _arrow_reader(ipc: Any, file: IO[bytes]) -> Any:
    """Return the batches of an Arrow stream (what ``datasets`` saves) or an Arrow file."""
    magic = file.read(6)
    file.seek(0)
    if magic != b"ARROW1":
        return ipc.open_stream(file)
    opened = ipc.open_file(file)

    class Batches:
        schema = opened.schema

        def __iter__(self) -> Iterator[Any]:
            return (opened.get_batch(index) for index in range(opened.num_record_batches))

    return Batches()


@contextmanager
def _seekable(source: Source, stream: Readable, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    if not source.compression:
        yield raw
        return
    with tempfile.TemporaryFile() as file:  # readers of these formats start at the end
        while data := stream.read(BLOCK_BYTES):
            file.write(data)
        file.seek(0)
        yield file


def _position(source: Source, raw: IO[bytes] | Readable) -> int:
    return 0 if source.path == STDIN else raw.tell()  # type: ignore[union-attr]


def _over(limit: int) -> str:
    return f"over {limit} bytes; --max-document-bytes raises the limit"
