"""Identities of files: content, wherever it changed, and nothing that a program can set back."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from mesh_megatron.config.data import DataConfig
from mesh_megatron.config.tokenizer import TokenizerConfig
from mesh_megatron.data.datasets import SampleCounts, build_datasets
from mesh_megatron.data.fingerprint import BLOCK, SPREAD, data_files
from mesh_megatron.data.indexed import write_index
from mesh_megatron.data.preprocessing import text_path
from mesh_megatron.data.preprocessing.merge import merge
from mesh_megatron.data.preprocessing.preprocess import PreprocessOptions, preprocess
from mesh_megatron.data.preprocessing.readers import SplitOptions
from mesh_megatron.data.preprocessing.sources import list_sources
from mesh_megatron.data.tokenizers import build_tokenizer

STAMP = (1_700_000_000, 1_700_000_000)
BYTES = build_tokenizer("ByteLevelTokenizer")


def put(path, content):
    """Write with one and the same time of change"""
    path.parent.mkdir(parents=True, exist_ok=True)
    time.sleep(0.02)  # a tick of the clock that the kernel stamps changes with
    path.write_bytes(content)
    os.utime(path, STAMP)
    return str(path)


def texts(*paths, **options):
    data = DataConfig(data_path=paths, split="1,0,0", tokenizer_type="ByteLevelTokenizer", **options)
    counts = SampleCounts(train=8, valid=0, test=0)
    train = build_datasets(data, counts, seq_length=14, seed=1, tokenizer=BYTES, vocab_size=257).train
    return {BYTES.detokenize(train[index]["tokens"].tolist()) for index in range(len(train))}


def test_text_files_of_one_name_size_and_time_in_one_cache(tmp_path):
    english = put(tmp_path / "en" / "t.txt", b"hello english\n")
    german = put(tmp_path / "de" / "t.txt", b"hallo deutsch\n")
    assert len(texts(english, german, data_cache_path=tmp_path / "cache")) == 2


def test_a_text_file_rewritten_with_its_size_and_time(tmp_path):
    assert texts(put(tmp_path / "t.txt", b"hello english\n")) != texts(put(tmp_path / "t.txt", b"hallo deutsch\n"))


def test_one_content_under_two_suffixes(tmp_path):
    record = b'{"text": "hello"}'
    found = [texts(put(tmp_path / name, record), data_cache_path=tmp_path / "c") for name in ("t.txt", "t.jsonl")]
    assert found[0] != found[1]


def test_a_copy_needs_no_second_preprocessing_and_resumes_the_first(tmp_path, monkeypatch):
    cache = {"data_cache_path": tmp_path / "cache"}
    first, copy = (put(tmp_path / name / "t.txt", b"hello english\n" * 9) for name in ("a", "b"))
    os.utime(copy)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "mesh_megatron.data.preprocessing.writer.DatasetWriter.finish",
            lambda *args: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        texts(first, **cache)
    assert len(list((tmp_path / "cache").glob("*.partial"))) == 1
    assert texts(copy, **cache) == texts(first, **cache) == texts(first, copy, **cache)
    assert len(list((tmp_path / "cache").glob("*_text_document.idx"))) == 1


def test_text_that_changes_while_it_is_read_is_not_cached(tmp_path, monkeypatch):
    path = put(tmp_path / "t.txt", b"hello english\n")

    def changing(*args):
        put(tmp_path / "t.txt", b"hallo deutsch\n")
        return preprocess(*args)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="t.txt changed while it was preprocessed"):
        patch.setattr(text_path, "preprocess", changing)
        texts(path)
    assert any("hallo" in text for text in texts(path))


def many_documents(prefix, lengths):
    lengths = np.array(lengths, np.int32)
    Path(f"{prefix}.bin").write_bytes(bytes(2 * int(lengths.sum())))
    write_index(Path(f"{prefix}.idx"), np.dtype(np.uint16), lengths, np.ones(len(lengths), np.int32))
    return str(prefix)


def test_a_sample_index_is_of_all_lengths(tmp_path):
    """The .idx differ in the middle alone."""
    half = [1] * 300_000
    found = []
    for middle in ([1, 9], [9, 1]):
        data = DataConfig(data_path=(many_documents(tmp_path / "a", half + middle + half),), split="1")
        counts = SampleCounts(train=10, valid=0, test=0)
        build_datasets(data, counts, seq_length=16, seed=1, tokenizer=None, vocab_size=128)
        found.append({file.name for file in (tmp_path / "cache").glob("*-sample_index.npy")})
    assert len(found[0]) == 1 and len(found[1]) == 2


@pytest.mark.parametrize("end", [".idx", ".bin", ".txt"])
def test_a_changed_byte_in_the_middle_is_another_file(tmp_path, end):
    for name in ("a.idx", "a.bin", "t.txt"):
        (tmp_path / name).write_bytes(bytes(5 * BLOCK + 7))
    data = DataConfig(data_path=(str(tmp_path / "a"), str(tmp_path / "t.txt")))
    before = data_files(data)
    assert [Path(name).name for name in before] == ["a.idx", "a.bin", "t.txt"]
    changed = next(tmp_path.glob(f"*{end}"))
    put(changed, bytes(2 * BLOCK + 3) + b"\1" + bytes(3 * BLOCK + 3))
    assert [name for name, now in data_files(data).items() if now != before[name]] == [str(changed)]


def test_long_tokens_are_looked_at_from_end_to_end(tmp_path):
    """A change at any position is found, by the checksum that was stored when the tokens were written."""
    size = (SPREAD + 1) * BLOCK
    seen = set()
    for at in (None, 0, size // 3, size - 1):
        with open(tmp_path / "a.bin", "wb") as file:
            file.truncate(size)
            if at is not None:
                file.seek(at)
                file.write(b"\1")
        seen.add(data_files(DataConfig(data_path=(str(tmp_path / "a"),)))[f"{tmp_path}/a.bin"])
    (tmp_path / "a.json").write_text('{"format": "mesh_megatron", "bin_xxh3_64": "0123456789abcdef"}')
    seen.add(data_files(DataConfig(data_path=(str(tmp_path / "a"),)))[f"{tmp_path}/a.bin"])
    assert len(seen) == 5


def test_a_finished_output_of_other_text_is_not_left_as_it_is(tmp_path):
    tokenizer, options = (
        TokenizerConfig(tokenizer_type="ByteLevelTokenizer"),
        PreprocessOptions(resume=True, show_progress=False),
    )

    def run():
        sources = list_sources([str(tmp_path / "t.txt")])
        return preprocess(sources, f"{tmp_path}/out", tokenizer, SplitOptions(), options)

    put(tmp_path / "t.txt", b"hello english\n")
    assert not run().already_there and run().already_there
    put(tmp_path / "t.txt", b"hallo deutsch\n")
    with pytest.raises(ValueError, match="out_text_document.idx exists"):
        run()


def test_a_finished_merge_of_other_tokens_is_not_left_as_it_is(tmp_path):
    for name in "ab":
        many_documents(tmp_path / name, [3, 4])
    prefixes = [f"{tmp_path}/a", f"{tmp_path}/b"]
    os.utime(tmp_path / "a.bin", STAMP)
    merge(prefixes, f"{tmp_path}/out")
    merge(prefixes, f"{tmp_path}/out", resume=True)
    put(tmp_path / "a.bin", bytes(range(14)))
    with pytest.raises(ValueError, match="out.idx exists"):
        merge(prefixes, f"{tmp_path}/out", resume=True)
