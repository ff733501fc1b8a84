"""Compressed files of several streams: read and refused as their command-line tools do."""

import bz2
import gzip
import lzma
import shutil
import struct
import subprocess
import zlib

import pytest
import zstandard

from mesh_megatron.data.preprocessing.decompression import DamagedError, open_stream
from mesh_megatron.data.preprocessing.documents import parse
from mesh_megatron.data.preprocessing.readers import TRAILING, SplitOptions, read_blocks
from mesh_megatron.data.preprocessing.sources import Source, list_sources

A, B = b"first\n" * 1000, b"second\n" * 1000
ZSTD = zstandard.ZstdCompressor(write_checksum=True)
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": ZSTD.compress}
TOOLS = {".gz": ["gzip"], ".bz2": ["bzip2"], ".xz": ["xz"], ".zst": ["zstd", "--long=31", "--memory=2048MB"]}
SKIPPABLE = struct.pack("<II", 0x184D2A53, 7) + b"ignored"
OLD = lzma.compress(A, lzma.FORMAT_ALONE)
REFUSED = None


def damaged(data, at):
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]


def window(log):
    """A .zst frame of ``A`` that asks for a window of 2^log bytes"""
    return b"\x28\xb5\x2f\xfd\0" + bytes([(log - 10) << 3]) + (len(A) << 3 | 1).to_bytes(3, "little") + A


def gzip_with_flags(flags, more):
    packed = gzip.compress(A, mtime=0)
    return packed[:3] + bytes([flags]) + packed[4:10] + more + packed[10:]


def cases():
    """(suffix, what it is) -> (content, its text or REFUSED, bytes that are ignored)"""
    found = {}
    for suffix, pack in PACK.items():
        a, b = pack(A), pack(B)
        junk = {".gz": A, ".bz2": A}.get(suffix, REFUSED)
        found |= {
            (suffix, "two streams"): (a + b, A + B, 0),
            (suffix, "an empty stream"): (pack(b""), b"", 0),
            (suffix, "an empty stream between two"): (a + pack(b"") + b, A + B, 0),
            (suffix, "five hundred small streams"): (pack(b"x\n") * 500, b"x\n" * 500, 0),
            (suffix, "nothing compressed"): (A, REFUSED, 0),
            (suffix, "zeros alone"): (b"\0" * 8, REFUSED, 0),
            (suffix, "a first stream cut off"): (a[:-5], REFUSED, 0),
            (suffix, "a second stream cut off"): (a + b[:-5], REFUSED, 0),
            (suffix, "a second header cut off"): (a + b[:3], REFUSED, 0),
            (suffix, "a damaged second stream"): (a + damaged(b, len(b) // 2), REFUSED, 0),
            (suffix, "text behind it"): (a + b"not compressed", junk, 14),
            (suffix, "a stream behind text"): (a + b"junk" + b, junk, 4 + len(b)),
        }
        for zeros in (1, 3, 4, 8, 4096, 20_000):
            text = {".gz": A, ".bz2": A, ".xz": REFUSED if zeros % 4 else A}.get(suffix, REFUSED)
            found[suffix, f"{zeros} zeros"] = (a + b"\0" * zeros, text, zeros if suffix == ".bz2" else 0)
    a, b = lzma.compress(A), lzma.compress(B, check=lzma.CHECK_NONE)
    found |= {
        (".xz", "padding between two"): (a + b"\0" * 8 + b, A + B, 0),
        (".xz", "odd padding between two"): (a + b"\0" * 6 + b, REFUSED, 0),
        (".xz", "padding first"): (b"\0" * 4 + a, REFUSED, 0),
        (".xz", "the old format"): (OLD, A, 0),
        (".xz", "two of the old format"): (OLD + OLD, REFUSED, 0),
        (".xz", "padding after the old format"): (OLD + b"\0" * 4, REFUSED, 0),
        (".xz", "the old format behind the new"): (a + OLD, REFUSED, 0),
        (".gz", "one byte behind it"): (gzip.compress(A) + b"x", REFUSED, 0),
        (".gz", "a header with a name and a comment"): (gzip_with_flags(8 | 16, b"name\0comment\0"), A, 0),
        (".gz", "encrypted"): (gzip_with_flags(32, b""), REFUSED, 0),
        (".gz", "zlib"): (zlib.compress(A), REFUSED, 0),
        (".zst", "skippable frames"): (SKIPPABLE + ZSTD.compress(A) + SKIPPABLE, A, 0),
        (".zst", "a skippable frame cut off"): (ZSTD.compress(A) + SKIPPABLE[:-2], REFUSED, 0),
        (".zst", "a window of 2 GiB"): (window(31), A, 0),
        (".zst", "a window of 4 GiB"): (window(32), REFUSED, 0),
    }
    return [pytest.param(*key, *value, id=" ".join(key)) for key, value in found.items()]


def read_all(path, suffix):
    """(text, bytes ignored); text is REFUSED if that ends in an error"""
    text = b""
    with open_stream(Source(str(path), "text", suffix, 1)) as (stream, _):
        try:
            while data := stream.read(4096):
                text += data
        except DamagedError:
            return REFUSED, 0
        return text, stream.ignored


@pytest.mark.parametrize("suffix, what, content, text, ignored", cases())
def test_streams_one_after_the_other(tmp_path, suffix, what, content, text, ignored):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(content)
    assert read_all(path, suffix) == (text, ignored if text is not REFUSED else 0)


@pytest.mark.parametrize("suffix, what, content, text, ignored", cases())
def test_the_command_line_tool_says_the_same(tmp_path, suffix, what, content, text, ignored):
    command, *options = TOOLS[suffix]
    if not shutil.which(command):
        pytest.skip(f"{command} is not installed")
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(content)
    done = subprocess.run([command, "-dc", *options, path], capture_output=True, timeout=60)
    accepted = done.returncode == 0 or (done.returncode == 2 and suffix == ".gz")  # 2 is gzip's warning
    assert (done.stdout if accepted else REFUSED) == text
    assert not ignored or text is REFUSED or b"trailing garbage" in done.stderr


def test_a_gzip_member_behind_padding_is_read(tmp_path):
    """The tool passes over it with a warning; nothing is gained by losing text."""
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(A) + b"\0" * 5 + gzip.compress(B))
    assert read_all(tmp_path / "a.txt.gz", ".gz") == (A + B, 0)


@pytest.mark.parametrize("suffix", PACK)
def test_what_comes_before_damage_is_kept(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    packed = PACK[suffix](B)
    path.write_bytes(PACK[suffix](A) + damaged(packed, len(packed) // 2))
    (source,) = list_sources([str(path)])
    documents, problems = [], []
    for block in read_blocks(source, SplitOptions("line")):
        more, wrong, _ = parse(block, source, SplitOptions("line"))
        documents, problems = documents + more, problems + wrong
    assert len(documents) >= 1000 and documents[0].texts == [["first"]]
    assert [problem.kind for problem in problems] == ["damaged file"]


def test_bytes_behind_the_last_stream_are_a_problem_without_a_document(tmp_path):
    (tmp_path / "a.txt.bz2").write_bytes(bz2.compress(b"one\n\ntwo") + b"junk")
    (source,) = list_sources([str(tmp_path / "a.txt.bz2")])
    first, last = read_blocks(source, SplitOptions())
    assert len(parse(first, source, SplitOptions())[0]) == 2
    assert last.payload.kind == TRAILING and last.payload.detail.startswith("4 bytes")
