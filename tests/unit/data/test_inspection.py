"""Inspection counts right, and finds every kind of damage."""

from pathlib import Path

import numpy as np
import pytest

from mesh_megatron.commands.inspect_data import Arguments, inspect_all
from mesh_megatron.data import inspection
from mesh_megatron.data.indexed import read_indexed, verify
from mesh_megatron.data.inspection import count_tokens, inspect, report
from mesh_megatron.data.tokenizers import build_tokenizer


@pytest.fixture
def prefix(write_prefix):
    return write_prefix("a", [[7] * size + [100] for size in range(1, 100)])


def test_counts(prefix, monkeypatch):
    monkeypatch.setattr(inspection, "BLOCK", 1000)
    found = inspect(prefix, frequent=1, samples=2, sample_tokens=2)
    assert (found.documents, found.sequences, found.tokens, found.bytes) == (99, 99, 5049, 10098)
    assert (found.dtype, found.distinct_tokens, found.highest_token, found.empty_documents) == ("uint16", 2, 100, 0)
    assert found.frequent_tokens == {7: 4950}
    assert found.length_mean == 51
    assert (found.length_percentiles[0], found.length_percentiles[50], found.length_percentiles[100]) == (2, 51, 100)
    assert found.length_histogram == {2: 2, 4: 4, 8: 8, 16: 16, 32: 32, 64: 37}
    assert found.samples == {0: "7 100", 98: "7 7"}


def test_report_reads_well(prefix):
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=100)
    text = report(inspect(prefix, tokenizer), tokenizer)
    assert "99 documents, 99 sequences, 5,049 tokens, 10,098 bytes" in text
    assert "every offset is right" in text and "98.04% 4,950 '7'" in text


def test_histogram_equals_numpy():
    tokens = np.random.default_rng(0).integers(0, 5000, 100_000).astype(np.int32)
    assert np.array_equal(count_tokens(tokens), np.bincount(tokens))
    with pytest.raises(ValueError, match="token 3 is negative: -5"):
        count_tokens(np.array([1, 2, 3, -5], dtype=np.int32))


def change(path, offset, value):
    content = bytearray(Path(path).read_bytes())
    content[offset : offset + len(value)] = value
    Path(path).write_bytes(content)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: Path(p + ".bin").write_bytes(Path(p + ".bin").read_bytes()[:-2]), "one is truncated or belongs"),
        (lambda p: Path(p + ".bin").write_bytes(b""), "holds 0 bytes"),
        (lambda p: Path(p + ".idx").write_bytes(Path(p + ".idx").read_bytes()[:-1]), r"\.idx is truncated"),
        (lambda p: Path(p + ".idx").write_bytes(b"MMIDIDX"), "less than a header"),
        (lambda p: Path(p + ".idx").write_bytes(Path(p + ".idx").read_bytes() + b"x" * 200), "too long"),
        (lambda p: change(p + ".idx", 0, b"X"), "is not a Megatron .idx file"),
        (lambda p: change(p + ".idx", 17, b"\x63"), "is not a Megatron .idx file"),
        (lambda p: change(p + ".idx", 17, b"\x06"), "float64 numbers, which are no token ids"),
        (lambda p: change(p + ".idx", 34, b"\x03"), "expects"),
        (lambda p: change(p + ".idx", 34 + 4 * 99 + 8 * 5, b"\x03"), "sequence 5 starts at byte"),
        (lambda p: change(p + ".idx", 34 + 12 * 99 + 8 * 7, b"\x63"), "document 7 ends before it starts"),
        (lambda p: change(p + ".idx", 34 + 12 * 99 + 8 * 99, b"\x01"), "do not cover"),
        (lambda p: Path(p + ".bin").unlink(), "no such file"),
    ],
)
def test_damage_is_found(prefix, damage, message):
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        inspect(prefix)


def test_a_changed_token_is_found_by_the_noted_checksum(prefix):
    digest = inspect(prefix).bin_xxh3_64
    Path(prefix + ".json").write_text(f'{{"format": "mesh_megatron", "bin_xxh3_64": "{digest}"}}')
    assert inspect(prefix).description
    change(prefix + ".bin", 100, b"\x55")
    with pytest.raises(ValueError, match="changed or damaged since it was written"):
        inspect(prefix)


def test_errors_name_the_pair(write_prefix):
    prefix = write_prefix("negative", [[1, 2, -5]], np.int32)
    with pytest.raises(ValueError, match=r"negative\.bin: token 2 is negative: -5"):
        inspect(prefix)
    prefix = write_prefix("damaged", [[1, 2, 2**31 - 1]], np.int32)
    with pytest.raises(ValueError, match=r"damaged\.bin: token 2 is 2147483647: no vocabulary is so large"):
        inspect(prefix)
    prefix = write_prefix("other", [[1, 2], [1000]], np.int32)
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=100)
    tokenizer.detokenize = lambda ids: bytes(ids).decode()  # a library that refuses ids beyond its vocabulary
    with pytest.raises(ValueError, match="other: document 1 does not fit this tokenizer"):
        inspect(prefix, tokenizer)
    with pytest.raises(ValueError, match="other: id 1000 does not fit this tokenizer"):
        report(inspect(prefix, tokenizer, samples=1), tokenizer)


def test_reads_as_megatron_does(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    file, theirs = read_indexed(prefix), IndexedDataset(prefix)
    verify(file)
    assert len(theirs) == file.documents
    assert all(np.array_equal(theirs[number], file.document(number)) for number in range(len(theirs)))


def test_output_that_cannot_be_written_is_no_damage(prefix, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.print", full)
    with pytest.raises(OSError, match="No space left"):
        inspect_all([prefix], None, Arguments(input=(prefix,)))
