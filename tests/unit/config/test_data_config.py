import dataclasses
import os
from pathlib import Path

import pytest

from mesh_megatron.config.data import DataConfig, parse_split, read_blend


@pytest.fixture
def prefix(tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"wiki{suffix}").write_bytes(b"x")
    return str(tmp_path / "wiki")


def test_accepts_a_pair_of_files(prefix):
    DataConfig(data_path=(prefix,)).validate()
    DataConfig(data_path=("0.3", prefix)).validate()
    DataConfig(mock_data=True).validate()


@pytest.mark.parametrize(
    "suffix, content, message",
    [(".bin", None, "wiki.bin does not"), (".idx", None, "wiki.idx does not"), (".bin", b"", "wiki.bin is empty")],
)
def test_finds_missing_and_empty_files(tmp_path, prefix, suffix, content, message):
    file = tmp_path / f"wiki{suffix}"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"--data-path .*{message}"):
        DataConfig(data_path=(prefix,)).validate()


@pytest.mark.parametrize("name", ["wiki.bin", "wiki.idx", "a.txt"])
def test_a_file_that_must_not_be_read_is_named(tmp_path, prefix, monkeypatch, name):
    (tmp_path / "a.txt").write_text("words")
    readable = os.access  # root may read every file, so the mode alone would show nothing here
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != name and readable(path, mode))
    data = DataConfig(data_path=(prefix, str(tmp_path / "a.txt")), tokenizer_type="ByteLevelTokenizer")
    with pytest.raises(ValueError, match=f"--data-path .*{name} cannot be read: no permission"):
        data.validate()


def test_names_what_to_write_instead(tmp_path, prefix):
    with pytest.raises(ValueError, match="neither .*nothing.bin"):
        DataConfig(data_path=(str(tmp_path / "nothing"),)).validate()
    with pytest.raises(ValueError, match=f"without .bin: {prefix}"):
        DataConfig(data_path=(prefix + ".bin",)).validate()
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match="is text: give --tokenizer-type"):
        DataConfig(data_path=(str(tmp_path / "a.txt"),)).validate()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "no data: give --data-path"),
        ({"mock_data": True, "data_path": ("x",)}, "--mock-data"),
        ({"data_path": ("x",), "train_data_path": ("y",)}, "exclude each other"),
        ({"mock_data": True, "tokenizer_type": "SentencePieceTokenizer"}, "needs --tokenizer-model"),
        ({"mock_data": True, "tokenizer_type": "NullTokenizer"}, "needs --vocab-size"),
        ({"mock_data": True, "eod_mask_loss": True}, "--eod-mask-loss need the tokenizer"),
        ({"mock_data": True, "num_workers": -1}, "--num-workers -1"),
        ({"mock_data": True, "split": "9,9,9,9"}, "--split 9,9,9,9"),
        ({"valid_data_path": ("a=x", "y")}, "name every set"),
        ({"valid_data_path": ("a=x", "a=y")}, "two sets have one name"),
    ],
)
def test_refuses_with_flag_and_fix(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DataConfig(), **changes).validate()


def test_a_folder_of_texts_is_to_be_preprocessed(tmp_path):
    data = DataConfig(data_path=(str(tmp_path),))
    with pytest.raises(
        ValueError, match=rf"--data-path {tmp_path}: is a folder; .*preprocess_data.py --input {tmp_path}"
    ):
        data.validate()


def test_blends():
    assert read_blend("--data-path", ("a", "b")) == [(None, "a"), (None, "b")]
    assert read_blend("--data-path", ("30", "a", ".7", "b")) == [(30.0, "a"), (0.7, "b")]
    for bad in (("1", "a", "b"), ("1", "a", "b", "2"), ("1", "2"), ("0", "a", "1", "b"), ("1", "a", "2", "a"), ("1",)):
        with pytest.raises(ValueError, match="--data-path"):
            read_blend("--data-path", bad)


def test_a_prefix_listed_twice_by_any_path(tmp_path, monkeypatch):
    """Two datasets of one file have the same order: each sample would come twice, one right after the other."""
    monkeypatch.chdir(tmp_path)
    Path("a.idx").write_bytes(b"x")
    Path("link.idx").symlink_to("a.idx")
    Path("b.txt").write_text("text")
    for first, second in (("a", "a"), ("a", "./a"), ("a", str(tmp_path / "a")), ("a", "link"), ("b.txt", "./b.txt")):
        with pytest.raises(ValueError, match=f"{second} is listed twice: name it once, or give weights"):
            read_blend("--data-path", (first, "c", second))
        with pytest.raises(ValueError, match=f"{second} is listed twice: combine the weights"):
            read_blend("--data-path", ("1", first, "1", "c", "1", second))


def test_validation_sets():
    named = DataConfig(valid_data_path=("wiki=/d/w", "code=/d/c"))
    assert named.validation_sets == {"wiki": ("/d/w",), "code": ("/d/c",)}
    plain = DataConfig(valid_data_path=("/d/w", "/d/c"), multiple_validation_sets=True)
    assert plain.validation_sets == {"w": ("/d/w",), "c": ("/d/c",)}
    assert DataConfig(valid_data_path=("1", "/d/w")).validation_sets == {"validation": ("1", "/d/w")}
    assert DataConfig().validation_sets == {}


def test_a_path_with_an_equals_sign_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("date=2024/x.bin", "date=2024/x.idx", "date=2024/y.txt", "2024/y.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"x")
    several = DataConfig(valid_data_path=("date=2024/x", "date=2024/y.txt"))
    with pytest.raises(ValueError, match=r"write \./date=2024/y.txt or date=\./2024/y.txt"):
        _ = several.validation_sets
    (tmp_path / "2024" / "y.txt").unlink()
    assert several.validation_sets == {"validation": ("date=2024/x", "date=2024/y.txt")}
    assert several.sources()["--valid-data-path"] == ["date=2024/x", "date=2024/y.txt"]
    named = DataConfig(valid_data_path=("may=date=2024/x", "june=./june=1"))
    assert named.validation_sets == {"may": ("date=2024/x",), "june": ("./june=1",)}


def test_a_prefix_that_looks_like_a_weight_is_asked_about(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_blend("--data-path", ("2023", "wiki")) == [(2023.0, "wiki")]
    Path("2023.idx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"--data-path 2023: a weight, or the prefix .* Write 02023 or \./2023"):
        read_blend("--data-path", ("2023", "wiki"))
    assert read_blend("--data-path", ("02023", "wiki")) == [(2023.0, "wiki")]
    assert read_blend("--data-path", ("./2023", "wiki")) == [(None, "./2023"), (None, "wiki")]


def test_split():
    assert parse_split("969,30,1") == (0.969, 0.03, 0.001)
    assert parse_split("1") == (1.0, 0.0, 0.0)
    assert parse_split(" 98.5, .5 ,1.") == (0.985, 0.005, 0.01)
    assert parse_split("'99,1,0'") == parse_split('"99,1"') == (0.99, 0.01, 0.0)  # train_llama3_8b_h100_fp8.sh


@pytest.mark.parametrize(
    "split", ["", ",", "0,0,0", "9,9,9,9", "-1,1", "nan", "inf,1", "1e3,1,1", "1_0,1", "+1", "1,,1"]
)
def test_numbers_that_megatron_core_reads_otherwise_are_no_split(split):
    with pytest.raises(ValueError, match="write up to three numbers"):
        parse_split(split)
