"""Every format and compression gives the documents that were written; damage is found, and nothing crashes."""

import bz2
import gzip
import json
import lzma
import pickle
import re
import time

import pyarrow
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mesh_megatron.data.preprocessing import readers
from mesh_megatron.data.preprocessing.documents import parse
from mesh_megatron.data.preprocessing.readers import Block, Problem, SplitOptions, read_blocks
from mesh_megatron.data.preprocessing.sources import list_sources

ZSTD = zstandard.ZstdCompressor(write_checksum=True)
PACK = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: b"".join(map(ZSTD.compress, (data[:9], data[9:]))),  # two frames
}
KINDS = {
    "broken JSON",
    "damaged file",
    "document too long",
    "empty file",
    "invalid UTF-8",
    "missing key",
    "not an object",
    "not text",
}
TEXTS = ["first", "zweites\nÜ", "three  ", "", '"quoted" \\ \t', "6\u2028"]


def read(path, split_options=None):
    """(texts, problems as (kind, line)) of one file"""
    split_options = split_options or SplitOptions()
    (source,) = list_sources([str(path)], text_suffixes=[".py"])
    texts, problems, line = [], [], 0
    for block in read_blocks(source, split_options):
        documents, wrong, lines = parse(block, source, split_options)
        texts += [parts[0] for document in documents for parts in document.texts]
        problems += [(problem.kind, line + problem.line) for problem in wrong]
        line += lines
    return texts, problems


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(params=[1 << 22, 16], ids=["one block", "many blocks"])
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("suffix", PACK)
def test_json_lines(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](b"\xef\xbb\xbf" + jsonl(TEXTS).replace(b"\n", b"\r\n\n", 1)))
    assert read(path) == (TEXTS, [])


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize(
    "separator, content, expected",
    [
        ("blank-line", "\n\na\nb\n\n \t\n    c d  \r\n\r\ne\n", ["a\nb", "    c d  ", "e"]),
        ("line", "a\n\n b\r\nc", ["a", " b", "c"]),
        ("file", "a\n\nb\n", ["a\n\nb\n"]),
        ("<|end|>", "a\n\n<|end|> b<|end|><|end|>c<|end|>", ["a\n\n", " b", "c"]),
        ("\\n---\\n", "a\nx\n---\nb--\n", ["a\nx", "b--\n"]),
    ],
)
def test_text(tmp_path, suffix, separator, content, expected):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix](content.encode()))
    assert read(path, SplitOptions(separator)) == (expected, [])


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("layout", ["lines", "array", "indented array", "one after the other", "on one line"])
def test_json(tmp_path, suffix, layout):
    records = [{"text": text} for text in TEXTS]
    content = {
        "lines": jsonl(TEXTS),
        "array": json.dumps(records).encode(),
        "indented array": json.dumps(records, indent=2, ensure_ascii=False).encode(),
        "one after the other": "\n".join(json.dumps(record, indent=1) for record in records).encode(),
        "on one line": " ".join(map(json.dumps, records)).encode(),
    }[layout]
    path = tmp_path / f"a.json{suffix}"
    path.write_bytes(PACK[suffix](content))
    assert read(path) == (TEXTS, [])


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("end", ["", ",", ", ", "\n", " [], [{}"])
def test_an_array_without_its_end_is_broken(tmp_path, end):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}])[:-1] + end)
    texts, problems = read(path)
    assert texts == ["a", "b"] and problems[-1] == ("broken JSON", 2 + end.count("{"))
    path.write_text(path.read_text() + "]" * (1 + end.count("{")))
    assert read(path) == (["a", "b"], [("missing key", 2)] * end.count("{"))


def test_a_broken_first_line_costs_no_other_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"} and more\n{"text": "b"}\n')
    assert read(path) == (["b"], [("broken JSON", 0)])


def test_many_small_values_take_time_in_proportion(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}] * 300_000))
    (source,) = list_sources([str(path)])
    start = time.perf_counter()
    assert sum(len(block.payload) for block in read_blocks(source, SplitOptions())) == 300_000
    assert time.perf_counter() - start < 5  # 0.4 s; more than 10 s if each value copies what comes after it


def test_values_nested_too_deeply_are_broken(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n{"text": ' + "[" * 100_000)
    assert read(path) == (["a"], [("broken JSON", 1)])


@pytest.mark.parametrize("suffix", PACK)
def test_parquet(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(readers, "ROWS", 4)
    table = pyarrow.table({"text": [*TEXTS, None], "other": list(range(7))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    path = tmp_path / f"b.parquet{suffix}"
    path.write_bytes(PACK[suffix]((tmp_path / "a.parquet").read_bytes()))
    assert read(path) == (TEXTS, [("missing key", 6)])
    assert read(path, SplitOptions(json_keys=("absent",))) == ([], [("missing key", 0)])


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_arrow(tmp_path, new):
    table = pyarrow.table({"text": TEXTS, "other": list(range(6))})
    with new(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    assert read(tmp_path / "a.arrow") == (TEXTS, [])


COLUMNS = {
    "string": lambda texts: pyarrow.array(texts),
    "list": lambda texts: pyarrow.array([[text] for text in texts]),
    "dictionary": lambda texts: pyarrow.array(texts).dictionary_encode(),
    "view": lambda texts: pyarrow.array(texts, pyarrow.string_view()),
}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_row_that_is_not_utf_8_is_named(tmp_path, name):
    bad = pyarrow.array([b"one", b"tw\xff", b"three"]).view(pyarrow.string())
    lists = pyarrow.ListArray.from_arrays([0, 1, 2, 3], bad)
    table = pyarrow.table({"text": bad, "list": lists, "good": ["a", "b", "c"]})
    if name.endswith("parquet"):
        parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_stream(tmp_path / name, table.schema) as stream:
            stream.write_table(table)
    for key in ("text", "list"):
        assert read(tmp_path / name, SplitOptions(json_keys=(key,))) == (["one", "three"], [("invalid UTF-8", 1)])
    assert read(tmp_path / name, SplitOptions(json_keys=("good",))) == (["a", "b", "c"], [])


def test_a_separator_is_never_empty_and_may_be_any_bytes(tmp_path):
    with pytest.raises(ValueError, match="--document-separator '': is empty"):
        SplitOptions("")
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\xfftwo\xff")
    assert read(path, SplitOptions("\udcff")) == (["one", "two"], [])


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_blocks_of_rows_are_bounded_in_bytes(tmp_path, monkeypatch, name, kind):
    """The bound also holds for the pickle that a worker receives: a slice's pickle would contain its complete array."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 5000)
    texts = [f"{number} " * 100 for number in range(300)] + ["x" * 9000] + ["y"] * 300
    table = pyarrow.table({"text": COLUMNS[kind](texts), "other": ["z" * 9000] * 601})
    if name == "a.parquet":
        parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    (source,) = list_sources([str(tmp_path / name)])
    found = list(read_blocks(source, SplitOptions()))
    sizes = [len(pickle.dumps(block)) for block in found]
    assert len([size for size in sizes if size > 6000]) == 1 and max(sizes) < 11_000  # the one long row by itself
    assert len(found) < 100
    assert read(tmp_path / name) == (texts, [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow"])
def test_no_format_gives_documents_over_the_limit(tmp_path, name):
    records = [{"text": parts} for parts in (["a"], ["x" * 101], ["é" * 51], ["x" * 51] * 2, ["b"])]
    table = pyarrow.Table.from_pylist(records)
    if name == "a.parquet":
        parquet.write_table(table, tmp_path / name)
    elif name == "a.arrow":
        with pyarrow.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    else:
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (tmp_path / name).write_text("[" + ",\n".join(lines) + "]" if name == "a.json" else "\n".join(lines))
    kind = "document too long"
    assert read(tmp_path / name, SplitOptions(max_document_bytes=100)) == (
        ["a", "b"],
        [(kind, 1), (kind, 2), (kind, 3)],
    )


def test_several_keys_and_lists(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a": "x", "b": ["y", "z"], "c": 1}) + "\n")
    (source,) = list_sources([str(path)])
    split_options = SplitOptions(json_keys=("a", "b"))
    (block,) = read_blocks(source, split_options)
    assert parse(block, source, split_options)[0][0].texts == [["x"], ["y", "z"]]


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize(
    "line, kind",
    [
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"text": "\\ud800"}', "invalid UTF-8"),
        (b'{"text": "x"', "broken JSON"),
        (b'{"text": "x"} y', "broken JSON"),
        (b"[" * 100000, "broken JSON"),
        (b'{"txt": "x"}', "missing key"),
        (b'{"text": null}', "not text"),
        (b'{"text": ["x", 1]}', "not text"),
        (b'["x"]', "not an object"),
        (b'{"text": "' + b"x" * 200_000 + b'"}', "document too long"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, kind):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl("ab") + b"\n" + line + b"\n" + jsonl("c"))
    assert read(path, SplitOptions(max_document_bytes=150_000)) == (["a", "b", "c"], [(kind, 3)])


def test_what_only_the_standard_library_parses_is_no_problem(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x", "score": NaN}\n')
    assert read(path) == (["x"], [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_number_of_any_length_is_no_problem(tmp_path, name):
    record = '{"text": "x", "id": ' + "1" * 5000 + "}\n"
    (tmp_path / name).write_text(f"[{record}, {record}]" if name == "a.json" else record * 2)
    assert read(tmp_path / name) == (["x", "x"], [])


def test_a_parquet_file_with_a_long_footer(tmp_path):
    """Sound, though over the limit that the library has by default."""
    table = pyarrow.table({"text": ["a", "b"]}).replace_schema_metadata({"note": "x" * (76 << 20)})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (["a", "b"], [])


def test_bad_text_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\nt\xff\n\n" + b"long " * 100 + b"\n\nfour")
    assert read(path, SplitOptions(max_document_bytes=100)) == (
        ["one", "four"],
        [("invalid UTF-8", 3), ("document too long", 5)],
    )


@pytest.mark.parametrize("separator", ["line", "file", "blank-line", "<|end|>"])
def test_a_document_far_over_the_limit_is_never_held(tmp_path, monkeypatch, separator):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    end = {"line": "\n", "blank-line": "\n\n", "file": ""}.get(separator, separator)
    path = tmp_path / "a.txt"
    path.write_text("a" + end + "x" * 50_000 + end + "b")
    texts, problems = read(path, SplitOptions(separator, max_document_bytes=3000))
    assert texts == ([] if separator == "file" else ["a", "b"])
    assert [kind for kind, _ in problems] == ["document too long"]


def test_empty_files(tmp_path):
    for name in ("a.jsonl", "a.txt", "a.py", "a.json.gz", "a.parquet"):
        (tmp_path / name).write_bytes(b"")
        assert read(tmp_path / name) == ([], [("empty file", 0)])


@pytest.mark.parametrize("suffix", [suffix for suffix in PACK if suffix])
def test_truncated_and_damaged_compressed_files(tmp_path, suffix):
    import random

    noise = [f"{random.Random(i).random()}" for i in range(3000)]
    packed = PACK[suffix](jsonl(noise))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed[: len(packed) * 2 // 3])
    texts, problems = read(path)
    assert [kind for kind, _ in problems] == ["damaged file"]
    assert texts == noise[: len(texts)]
    path.write_bytes(packed[:200] + b"\x00damage\xff" * 8 + packed[264:])
    texts, problems = read(path)
    assert problems and problems[-1][0] in ("damaged file", "broken JSON", "invalid UTF-8", "missing key")


def test_damaged_parquet_and_arrow(tmp_path):
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 nothing of the kind" * 20)
        assert read(tmp_path / name) == ([], [("damaged file", 0)])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(st.binary(max_size=300), st.text(max_size=100).map(str.encode)),
    name=st.sampled_from(
        ["a.jsonl", "a.json", "a.txt", "a.parquet", "a.arrow", "a.txt.gz", "a.jsonl.zst", "a.json.xz"]
    ),
    separator=st.sampled_from(["blank-line", "line", "file", "x"]),
    size=st.sampled_from([7, 64, 1 << 22]),
)
@example(data=b'[{"text": "a"}, {"text": ', name="a.json", separator="line", size=64)
@example(data=b'{"text": "a"}]]]][[,,', name="a.json", separator="line", size=64)
@example(data=b"ARROW1", name="a.arrow", separator="line", size=64)
def test_no_bytes_crash_a_reader(tmp_path, data, name, separator, size):
    """Fuzz: whatever a file holds, reading gives documents and named problems, and ends."""
    (tmp_path / name).write_bytes(data)
    split_options = SplitOptions(separator, max_document_bytes=100)
    whole, before = read(tmp_path / name, split_options), readers.BLOCK_BYTES
    readers.BLOCK_BYTES = size
    try:
        assert read(tmp_path / name, split_options) == whole  # where a file is cut into blocks changes nothing
    finally:
        readers.BLOCK_BYTES = before
    assert all(isinstance(text, str) for text in whole[0])
    assert {kind for kind, _ in whole[1]} <= KINDS


def test_cutting_does_not_depend_on_block_size(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(["a  b", "", " ", "", "c", "d", "\t", "e", "", "", ""] * 50))
    expected = read(path)
    for size in (3, 17, 100):
        monkeypatch.setattr(readers, "BLOCK_BYTES", size)
        assert read(path) == expected


@pytest.mark.parametrize("before, expected", [("a", ["a", "b"]), ("", ["b"])])
def test_blank_lines_without_end_take_time_in_proportion(tmp_path, monkeypatch, before, expected):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 16)
    path = tmp_path / "a.txt"
    path.write_text(before + "\n \r\n" * 40_000 + "b")
    start = time.perf_counter()
    assert read(path) == (expected, [])
    assert time.perf_counter() - start < 5  # tried from each of its lines the run would take minutes


@settings(max_examples=300, deadline=None)
@given(st.text("\n\n \t\ra").map(str.encode))
def test_a_run_of_blank_lines_counts_once_its_end_is_seen(data):
    runs = re.finditer(rb"\n(?:[ \t\r]*\n)+(?=[ \t\r]*[^ \t\r\n])", data)  # what it says, in quadratic time
    assert readers._last_end(readers.BLANK_LINES, bytearray(data)) == max((run.end() for run in runs), default=0)


def test_a_separator_that_overlaps_itself(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x---y----z-" * 300)
    expected = read(path, SplitOptions("--"))
    for size in (3, 17, 100):
        monkeypatch.setattr(readers, "BLOCK_BYTES", size)
        assert read(path, SplitOptions("--")) == expected


def test_a_block_of_a_problem_is_passed_on(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (source,) = list_sources([str(tmp_path / "a.txt")])
    block = Block(Problem("empty file"), 0, lines=3)
    assert parse(block, source, SplitOptions()) == ([], [Problem("empty file")], 3)
