"""Datasets of a run: splits, blends, named validation sets, document boundaries, checks, the cache."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mesh_megatron.config.data import DataConfig
from mesh_megatron.data.datasets import SampleCounts, build_datasets
from mesh_megatron.data.tokenizers import build_tokenizer

NULL = build_tokenizer("NullTokenizer", vocab_size=100)


def build(data, train=50, valid=5, test=0, train_order=None, **changes):
    settings = {"seq_length": 16, "seed": 1, "tokenizer": NULL, "vocab_size": 128, **changes}
    counts = SampleCounts(train=train, valid=valid, test=test, train_order=train_order)
    return build_datasets(data, counts, **settings)


def test_a_sample_is_shifted_text_and_deterministic(write_prefix, documents):
    data = DataConfig(data_path=(write_prefix("a", documents),), split="90,10,0")
    first, again = build(data), build(data)
    assert len(first.train) >= 50 and len(first.valid["validation"]) >= 5 and first.test is None
    sample = first.train[3]
    assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids", "sample_ids"}
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["tokens"].shape == (16,) and sample["sample_ids"] == 3
    assert torch.equal(again.train[3]["tokens"], sample["tokens"])
    assert not torch.equal(build(data, seed=2).train[3]["tokens"], sample["tokens"])


def test_training_and_validation_share_no_document(write_prefix):
    documents = [[number] * 17 for number in range(100)]
    data = DataConfig(data_path=(write_prefix("a", documents),), split="80,10,10")
    sets = build(data, train=60, valid=5, test=5)
    seen = {
        name: set(torch.cat([samples[i]["tokens"] for i in range(len(samples))]).tolist())
        for name, samples in {"train": sets.train, "valid": sets.valid["validation"], "test": sets.test}.items()
    }
    assert seen["train"] <= set(range(80))
    assert seen["valid"] <= set(range(80, 90))
    assert seen["test"] <= set(range(90, 100))


def test_blend_follows_its_weights(write_prefix):
    paths = [write_prefix(name, [[token] * 17] * 40) for name, token in (("a", 1), ("b", 2))]
    data = DataConfig(data_path=("0.75", paths[0], "0.25", paths[1]), split="1")
    train = build(data, train=400, valid=0).train
    ones = sum(int(train[i]["tokens"][0] == 1) for i in range(400))
    assert abs(ones - 300) <= 2


def test_blend_without_weights_follows_tokens_and_lasts_beyond_an_epoch(write_prefix):
    paths = (write_prefix("a", [[1] * 17] * 30), write_prefix("b", [[2] * 17] * 10))
    train = build(DataConfig(data_path=paths, split="1"), train=400, valid=0).train
    assert len(train) >= 400
    assert abs(sum(int(train[i]["tokens"][0] == 1) for i in range(400)) - 300) <= 2


@pytest.mark.parametrize("more", [20, 100, 500])
def test_an_order_goes_on_beyond_what_it_was_made_for(write_prefix, more):
    """Made for few samples and read for many: the same ones first, and none twice before all have been read."""
    path = write_prefix("a", [[number] * 16 for number in range(100)] + [[0]])
    data = DataConfig(data_path=(path,), split="1")
    short, long = build(data, train=20, valid=0).train, build(data, train=more, valid=0, train_order=20).train
    texts = [tuple(long[i]["tokens"].tolist()) for i in range(more)]
    assert texts[:20] == [tuple(short[i]["tokens"].tolist()) for i in range(20)]
    assert len(set(texts)) == min(more, 100) and texts[100:200] == texts[:100][: max(more - 100, 0)]


def test_a_blend_goes_on_beyond_what_its_order_was_made_for(write_prefix):
    paths = [write_prefix(name, [[token] * 17] * 40) for name, token in (("a", 1), ("b", 2))]
    data = DataConfig(data_path=("0.75", paths[0], "0.25", paths[1]), split="1")
    short, long = build(data, train=40, valid=0).train, build(data, train=400, valid=0, train_order=40).train
    assert all(torch.equal(short[i]["tokens"], long[i]["tokens"]) for i in range(40))
    assert len(long) == 400
    assert abs(sum(int(long[i]["tokens"][0] == 1) for i in range(400)) - 300) <= 2


def test_named_validation_sets(write_prefix, documents):
    wiki, code = write_prefix("wiki", [[1] * 17] * 9), write_prefix("code", [[2] * 17] * 9)
    train = (write_prefix("a", documents),)
    data = DataConfig(train_data_path=train, valid_data_path=(f"w={wiki}", f"c={code}"))
    valid = build(data).valid
    assert list(valid) == ["w", "c"]
    assert set(valid["w"][0]["tokens"].tolist()) == {1} and set(valid["c"][4]["tokens"].tolist()) == {2}
    data = DataConfig(train_data_path=train, valid_data_path=(wiki, code), multiple_validation_sets=True)
    assert list(build(data).valid) == ["wiki", "code"]


def test_document_boundaries(write_prefix):
    path = write_prefix("a", [[5, 6, 7, 100]] * 50)
    data = DataConfig(data_path=(path,), split="1", tokenizer_type="NullTokenizer", vocab_size=100)
    plain = build(data, valid=0).train[0]
    assert plain["position_ids"].tolist() == list(range(16)) and plain["loss_mask"].all()
    changes = {"reset_attention_mask": True, "eod_mask_loss": True}
    sample = build(dataclasses.replace(data, **changes), valid=0).train[0]
    end = sample["tokens"].tolist().index(100)
    assert sample["loss_mask"][end] == 0 and sample["loss_mask"].sum() == 12
    mask = sample["attention_mask"]
    assert mask.shape == (1, 16, 16) and mask[0, end + 1, end] and not mask[0, end, 0]


def test_mock_data():
    sets = build(DataConfig(mock_data=True))
    assert len(sets.train) >= 50 and int(sets.train[0]["tokens"].max()) < 128
    assert list(sets.valid) == ["validation"]


def test_without_tokenizer(write_prefix, documents):
    data = DataConfig(data_path=(write_prefix("a", documents),), split="1")
    assert build(data, valid=0, tokenizer=None).train[0]["tokens"].shape == (16,)


def test_a_share_without_documents_is_an_error_only_for_training(write_prefix, caplog):
    data = DataConfig(data_path=(write_prefix("a", [[1] * 99] * 4),))
    sets = build(data, test=5)
    assert sets.valid == {} and sets.test is None
    assert "holds no test documents at --split 969,30,1" in caplog.text
    caplog.clear()
    assert build(dataclasses.replace(data, split="1,1,0"), test=5).test is None  # none was asked for
    assert caplog.text == ""
    with pytest.raises(ValueError, match="no tokens to train on"):
        build(dataclasses.replace(data, split="1,99,0"))
    with pytest.raises(ValueError, match="nothing to train on"):
        build(dataclasses.replace(data, split="0,1,0"))


def test_ids_beyond_the_embedding_name_the_file(write_prefix):
    path = write_prefix("a", [[1] * 99, [1, 500] * 20])
    data = DataConfig(data_path=(path,), split="1")
    with pytest.raises(ValueError, match=r"--data-path: .*a\.bin holds id 500, the embedding has rows 0 to 127"):
        build(data, tokenizer=None)


@pytest.mark.parametrize("wrong", [500, -5])
def test_ids_that_the_first_look_missed_are_found_when_read(write_prefix, monkeypatch, wrong):
    from mesh_megatron.data import check, datasets

    monkeypatch.setattr(check, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(datasets, "EXACT_TOKENS", 128)
    path = write_prefix("a", [[1] * 1000, [1, wrong] * 20, [1] * 1000], np.int32)
    train = build(DataConfig(data_path=(path,), split="1"), tokenizer=None, train=120, valid=0).train
    with pytest.raises(ValueError, match=rf"a\.bin holds id {wrong}, "):
        [train[i] for i in range(len(train))]


def test_vocabulary_and_tokenizer_mismatch(write_prefix, documents):
    path = write_prefix("a", documents)
    data = DataConfig(data_path=(path,))
    with pytest.raises(ValueError, match="--padded-vocab-size 64 is smaller than the tokenizer's vocabulary of 101"):
        build(data, vocab_size=64)
    with pytest.raises(ValueError, match="holds id 100, the tokenizer's vocabulary ends at 50"):
        build(data, tokenizer=build_tokenizer("NullTokenizer", vocab_size=50))
    note = {"format": "mesh_megatron", "tokenizer": {"identity": {"class": "Other"}}}
    Path(path + ".json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match="preprocessed with another tokenizer"):
        build(data)


def test_truncated_files_are_found(write_prefix, documents):
    path = write_prefix("a", documents)
    content = Path(path + ".bin").read_bytes()
    Path(path + ".bin").write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"--data-path .*a\.bin holds .* bytes, a\.idx expects"):
        build(DataConfig(data_path=(path,)))


def test_the_cache_is_used_and_an_interrupted_one_is_not(write_prefix, documents, tmp_path, monkeypatch):
    from mesh_megatron.data import builder

    data = DataConfig(data_path=(write_prefix("a", documents),), split="1", data_cache_path=tmp_path / "cache")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(builder.os, "replace", killed)
        build(data, valid=0)
    assert list((tmp_path / "cache").iterdir()) == []
    expected = build(data, valid=0).train[7]["tokens"]
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert len(files) == 4
    assert torch.equal(build(data, valid=0).train[7]["tokens"], expected)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == files


def test_an_unwritable_cache_names_the_flag(write_prefix, documents, tmp_path):
    (tmp_path / "file").write_text("")
    data = DataConfig(data_path=(write_prefix("a", documents),), data_cache_path=tmp_path / "file" / "cache")
    with pytest.raises(ValueError, match="--data-cache-path .*cache"):
        build(data)


@pytest.mark.parametrize("suffix, text", [(".txt", "one two\n\nthree four\n"), (".jsonl", '{"text": "one two"}\n')])
def test_text_is_preprocessed_once_into_the_cache(tmp_path, suffix, text):
    path = tmp_path / f"a{suffix}"
    path.write_text(text * 60)
    data = DataConfig(data_path=(str(path),), split="90,10,0", tokenizer_type="ByteLevelTokenizer")
    data.validate()
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    first = build(data, tokenizer=tokenizer, vocab_size=257)
    (prefix,) = (tmp_path / "cache").glob("*.bin")
    stamp = prefix.stat().st_mtime_ns
    assert 256 in first.train[0]["tokens"].tolist() + first.train[1]["tokens"].tolist()  # documents end
    again = build(data, tokenizer=tokenizer, vocab_size=257)
    assert torch.equal(again.train[3]["tokens"], first.train[3]["tokens"])
    assert prefix.stat().st_mtime_ns == stamp
    path.write_text(text * 61)
    build(data, tokenizer=tokenizer, vocab_size=257)
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 2


def test_text_without_a_tokenizer_says_what_to_give(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="is text: give --tokenizer-type"):
        build(DataConfig(data_path=(str(tmp_path / "a.txt"),)), tokenizer=None)


def test_a_full_disk_under_the_cache_names_the_flag(write_prefix, documents, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    data = DataConfig(data_path=(write_prefix("a", documents),), split="1", data_cache_path=cache)
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("40000 requested and 15328 written")))
        with pytest.raises(ValueError, match=f"^--data-cache-path {cache}: the sample index cannot be .*15328 written"):
            build(data, valid=0)
    assert list(cache.iterdir()) == []
    path = tmp_path / "a.txt"
    path.write_text("text")
    data = DataConfig(data_path=(str(path),), tokenizer_type="ByteLevelTokenizer", data_cache_path=cache)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(
        ValueError, match=f"^--data-cache-path {cache}: {path} cannot be .*: .*No space left on device$"
    ):
        build(data, tokenizer=build_tokenizer("ByteLevelTokenizer"), vocab_size=257)


def test_text_that_cannot_be_preprocessed_names_the_flags_of_this_command(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"words": "x"}\n')
    data = DataConfig(data_path=(str(path),), tokenizer_type="ByteLevelTokenizer", data_cache_path=tmp_path / "cache")
    told = rf"^--data-path {path} is text .*line 1: missing key.*--on-error skip \(a flag of tools/preprocess_data.py"
    with pytest.raises(ValueError, match=told):
        build(data, tokenizer=build_tokenizer("ByteLevelTokenizer"), vocab_size=257)
    data = dataclasses.replace(data, data_cache_path=path / "cache")
    with pytest.raises(ValueError, match=f"^--data-cache-path: {path}/cache cannot be written to"):
        build(data, tokenizer=build_tokenizer("ByteLevelTokenizer"), vocab_size=257)


class Payload:
    """Unpickling this runs code."""

    def __reduce__(self):
        return (eval, ("open('ran', 'w').close()",))


@pytest.mark.parametrize("content", ["pickle", "array of objects", "no array"])
def test_cached_indices_that_would_run_code_are_refused(write_prefix, documents, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    data = DataConfig(data_path=(write_prefix("a", documents),), split="1", data_cache_path=tmp_path / "cache")
    build(data, valid=0)
    file = next((tmp_path / "cache").glob("*-document_index.npy"))
    if content == "array of objects":
        np.save(file, np.array([Payload()], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(pickle.dumps(Payload()) if content == "pickle" else b"")
    with pytest.raises(ValueError, match="document_index.npy is not an array of numbers"):
        build(data, valid=0)
    assert not Path("ran").exists()
    file.unlink()
    assert len(build(data, valid=0).train) >= 50


def test_origin_names_file_and_documents(write_prefix):
    paths = [write_prefix(name, [[first + i] * 17 for i in range(20)]) for name, first in (("a", 0), ("b", 50))]
    for data in (DataConfig(data_path=(paths[0],), split="1"), DataConfig(data_path=("1", paths[0], "1", paths[1]))):
        train = build(data, train=30, valid=0).train
        for index in range(30):
            path, documents = train.origin(index).split(" documents ")
            offset = 0 if path == str(paths[0]) else 50
            assert set(train[index]["tokens"].tolist()) <= {int(number) + offset for number in documents.split()}
            assert path in map(str, paths)
