"""Merging, against megatron.core's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mesh_megatron.data.check import read_description
from mesh_megatron.data.indexed import read_indexed
from mesh_megatron.data.inspection import inspect
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
    assert not list(tmp_path.glob("out*"))


def test_an_input_is_never_the_output_however_it_is_written(tmp_path, write_prefix, monkeypatch):
    a = write_prefix("a", [[1]])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.idx").symlink_to("a.idx")
    for output in (a, "a", "./a", f"{tmp_path}/../{tmp_path.name}/a", "link"):
        with pytest.raises(ValueError, match="is one of the inputs"):
            merge([a], output, overwrite=True)


def test_files_of_which_only_some_have_a_description(tmp_path, write_prefix):
    a, b, c = (write_prefix(name, [[1]]) for name in "abc")
    for name, kind in (("b", "X"), ("c", "Y")):
        Path(f"{tmp_path}/{name}.json").write_text(
            json.dumps({"format": "mesh_megatron", "tokenizer": kind, "append_eod": True})
        )
    for order in ([a, b, c], [b, a, c], [b, c, a]):
        with pytest.raises(ValueError, match="differ in their tokenizer: Y, X"):
            merge(order, str(tmp_path / "out"))
    for order in ([a, b], [b, a]):  # the tokenizer of one is unknown, so that of both is
        merge(order, str(tmp_path / "out"), overwrite=True)
        note = read_description(str(tmp_path / "out"))
        assert "tokenizer" not in note and "append_eod" not in note
        assert inspect(str(tmp_path / "out")).bin_xxh3_64 == note["bin_xxh3_64"]
    merge([b, write_prefix("d", [[2]])], str(tmp_path / "out"), overwrite=True)
    merge([b], str(tmp_path / "out"), overwrite=True)
    assert read_description(str(tmp_path / "out"))["tokenizer"] == "X"


def test_modes_of_multimodal_data_are_not_lost(tmp_path, write_prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path}/images.bin", dtype=np.uint16, multimodal=True)
    builder.add_document(torch.tensor([1, 2, 3]), [1, 2], [0, 1])
    builder.finalize(f"{tmp_path}/images.idx")
    assert read_indexed(f"{tmp_path}/images").document(0).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="images.idx holds a mode of each sequence"):
        merge([write_prefix("a", [[1]]), f"{tmp_path}/images"], str(tmp_path / "out"))


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
    (tmp_path / "link").symlink_to(tmp_path)
    for twice in (str(tmp_path), f"{tmp_path}/./a", f"{tmp_path}/link/a", f"{tmp_path}/link"):
        with pytest.raises(ValueError, match="--input .*: prefix listed twice"):
            list_prefixes([a, twice])
    (tmp_path / "a").mkdir()
    assert list_prefixes([a]) == [a]  # a pair, though there is a folder of that name
    with pytest.raises(ValueError, match="--input '': is empty"):
        list_prefixes([""])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .idx in this folder"):
        list_prefixes([str(tmp_path / "empty")])
