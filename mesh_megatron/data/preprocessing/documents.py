"""Parse a block's bytes into documents and problems (entries that are not documents)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

from mesh_megatron.data.preprocessing.readers import BLANK_LINES, Block, FileRange, Problem, SplitOptions
from mesh_megatron.data.preprocessing.sources import Source

_BOM = b"\xef\xbb\xbf"
_ENTRY = {"parquet": "row", "arrow": "row", "json": "entry"}


class Document(NamedTuple):
    """Texts of one document: for each key a list of strings (one, unless the value is a list)."""

    line: int
    texts: list[list[str]]


def parse(block: Block, source: Source, split_options: SplitOptions) -> tuple[list[Document], list[Problem], int]:
    """Return (documents, problems, lines in the block). Lines, rows and values count from 0 within the block."""
    payload = block.payload
    if isinstance(payload, Problem):
        return [], [payload], block.lines
    if isinstance(payload, list):
        found = [_record(number, value, split_options) for number, value in enumerate(payload)]
        lines = len(payload)
    elif isinstance(payload, FileRange | bytes):
        data = payload.read() if isinstance(payload, FileRange) else payload
        lines = data.count(b"\n")
        if block.first and data.startswith(_BOM):
            data = data[len(_BOM) :]
        pieces = _texts(data, split_options) if source.format == "text" else _json_lines(data, split_options)
        found = list(pieces)
    else:
        found, lines = list(_rows(payload, split_options)), payload.num_rows
    documents = [item for item in found if isinstance(item, Document)]
    return documents, [item for item in found if isinstance(item, Problem)], lines


def _json_lines(data: bytes, split_options: SplitOptions) -> Iterator[Document | Problem]:
    for number, line in enumerate(data.split(b"\n")):
        if not line or line.isspace():
            continue
        if len(line) > split_options.max_document_bytes:
            yield _too_long(number, len(line))
            continue
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            yield _second_look(number, line, split_options)
            continue
        yield _record(number, value, split_options)


def _second_look(number: int, line: bytes, split_options: SplitOptions) -> Document | Problem:
    """Parse a line that the fast parser refuses: the standard library accepts NaN and reports what is wrong. Integers
    are read as float because int refuses more than 4,300 digits."""
    try:
        return _record(number, json.loads(line.decode("utf-8"), parse_int=float), split_options)
    except UnicodeDecodeError as error:
        return Problem("invalid UTF-8", number, f"{error.reason} at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Problem("broken JSON", number, str(error))


def _record(number: int, value: Any, split_options: SplitOptions) -> Document | Problem:
    if not isinstance(value, dict):
        return Problem("not an object", number, f"{type(value).__name__} instead of an object with keys")
    texts: list[list[str]] = []
    size = 0
    for key in split_options.json_keys:
        if key not in value:
            return Problem("missing key", number, f"no {key!r}, there is {', '.join(map(repr, list(value)[:8]))}")
        text = value[key]
        parts = [text] if isinstance(text, str) else text
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            return Problem(
                "not text", number, f"{key!r} is {type(text).__name__}; a string or a list of them is needed"
            )
        try:
            size += sum(len(part) if part.isascii() else len(part.encode("utf-8")) for part in parts)
        except UnicodeEncodeError:
            return Problem("invalid UTF-8", number, f"{key!r} contains half a surrogate pair")
        texts.append(parts)
    return Document(number, texts) if size <= split_options.max_document_bytes else _too_long(number, size)


def _texts(data: bytes, split_options: SplitOptions) -> Iterator[Document | Problem]:
    number, counted = 0, 0
    for start, end in _spans(data, split_options):
        number, counted = number + data.count(b"\n", counted, start), start
        if end - start > split_options.max_document_bytes:
            yield _too_long(number, end - start)
            continue
        try:
            yield Document(number, [[data[start:end].decode("utf-8")]])
        except UnicodeDecodeError as error:
            line = number + data.count(b"\n", start, start + error.start)
            yield Problem("invalid UTF-8", line, f"{error.reason} at byte {error.start} of the document")


def _spans(data: bytes, split_options: SplitOptions) -> Iterator[tuple[int, int]]:
    """Yield where documents start and end; empty text between separators is not a document."""
    if split_options.separator == "file":
        yield 0, len(data)
        return
    by_line, blank = split_options.separator == "line", split_options.separator == "blank-line"
    pattern = BLANK_LINES if blank else re.compile(b"\n" if by_line else re.escape(split_options.separator_bytes()))
    start = 0
    for end, following in [match.span() for match in pattern.finditer(data)] + [(len(data), len(data))]:
        piece = data[start:end]
        if by_line or blank:
            lead = len(piece) - len(piece.lstrip(b"\r\n"))
            trail = len(piece) - len(piece.rstrip(b"\r\n"))
            if piece.strip():
                yield start + lead, end - trail
        elif piece:
            yield start, end
        start = following


def _rows(batch: Any, split_options: SplitOptions) -> Iterator[Document | Problem]:
    columns = [_values(batch.column(batch.schema.get_field_index(key))) for key in split_options.json_keys]
    for number, values in enumerate(zip(*columns, strict=True)):
        record = dict(zip(split_options.json_keys, values, strict=True))
        if undecodable := [(key, value) for key, value in record.items() if isinstance(value, UnicodeDecodeError)]:
            key, error = undecodable[0]
            yield Problem("invalid UTF-8", number, f"{error.reason} at byte {error.start} of {key!r}")
            continue
        missing = next((key for key, value in record.items() if value is None), None)
        if missing is not None:
            yield Problem("missing key", number, f"{missing!r} is null")
            continue
        yield _record(number, record, split_options)


def _values(column: Any) -> list[Any]:
    """Return the values of a column; the error instead of one that is not UTF-8, as Arrow does not check its texts."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(item) for item in column]


def _value(item: Any) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError as error:
        return error


def _too_long(number: int, size: int) -> Problem:
    return Problem("document too long", number, f"{size} bytes; --max-document-bytes raises the limit")


def describe(problem: Problem, source: Source, line: int) -> str:
    """Return a message for a problem in a block that starts at ``line`` (from 0) of its source."""
    where = f"{source.path}, {_ENTRY.get(source.format, 'line')} {line + problem.line + 1}"
    return f"{where}: {problem.kind}" + (f" ({problem.detail})" if problem.detail else "")
