"""Merging, against megatron.core's own."""

from pathlib import Path

import numpy as np
import pytest

from mesh_megatron.data.indexed import read_indexed
from mesh_megatron.data.preprocessing.merge import list_prefixes, merge


def test_bytes_are_megatrons(tmp_path, write_prefix, monkeypatch):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    monkeypatch.setattr("mesh_megatron.data.preprocessing.merge.BLOCK", 7)
    prefixes = [
        write_prefix(name, [[number] * (number + 1) for number in range(size)])
        for name, size in (("a", 9), ("b", 1), ("c", 20))
    ]
    merge(prefixes, str(tmp_path / "ours"))
    builder = IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=np.uint16)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(f"{tmp_path}/theirs.idx")
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/ours{suffix}").read_bytes() == Path(f"{tmp_path}/theirs{suffix}").read_bytes()
    assert read_indexed(str(tmp_path / "ours")).documents == 30


def test_refuses_what_does_not_fit(tmp_path, write_prefix):
    a, wide = write_prefix("a", [[1]]), write_prefix("w", [[1]], np.int32)
    with pytest.raises(ValueError, match="w holds int32, .*a uint16"):
        merge([a, wide], str(tmp_path / "out"))
    for name, kind in (("a", "X"), ("w", "Y")):
        Path(f"{tmp_path}/{name}.json").write_text(f'{{"format": "mesh_megatron", "tokenizer": "{kind}"}}')
    other = write_prefix("w", [[1]])
    with pytest.raises(ValueError, match="differ in their tokenizer"):
        merge([a, other], str(tmp_path / "out"))
    with pytest.raises(ValueError, match="is one of the inputs"):
        merge([a], a)
    assert not list(tmp_path.glob("out*"))


def test_resumes(tmp_path, write_prefix, monkeypatch):
    prefixes = [write_prefix(name, [[1, 2, 3]] * 5) for name in "abc"]
    merge(prefixes, str(tmp_path / "whole"))
    from mesh_megatron.data.preprocessing import merge as module

    append, done = module._append, []

    def failing(output, file):
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        done.append(file.prefix)
        append(output, file)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(module, "_append", failing)
        merge(prefixes, str(tmp_path / "out"))
    again = []
    monkeypatch.setattr(module, "_append", lambda output, file: (again.append(file.prefix), append(output, file)))
    merge(prefixes, str(tmp_path / "out"), resume=True)
    assert again == prefixes[2:]
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/out{suffix}").read_bytes() == Path(f"{tmp_path}/whole{suffix}").read_bytes()
    merge(prefixes, str(tmp_path / "out"), resume=True)
    assert again == prefixes[2:]


def test_prefixes_of_folders(tmp_path, write_prefix):
    b, a = write_prefix("b", [[1]]), write_prefix("a", [[1]])
    assert list_prefixes([str(tmp_path)]) == [a, b]
    assert list_prefixes([b + ".bin", a]) == [b, a]
    with pytest.raises(ValueError, match="--input .*: prefix listed twice"):
        list_prefixes([a, str(tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .idx in this folder"):
        list_prefixes([str(tmp_path / "empty")])
