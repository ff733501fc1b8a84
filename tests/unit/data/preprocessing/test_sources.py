import json
import os
from collections import Counter

import pytest

from mesh_megatron.data.preprocessing.sources import Source, list_sources, told


@pytest.fixture
def folder(tmp_path):
    for name in (
        "b.txt",
        "a.jsonl.gz",
        "sub/c.json",
        "sub/d.py",
        "notes.md",
        ".hidden/e.txt",
        ".f.txt",
        "z.parquet.zst",
    ):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path / "corpus"


def names(sources, folder):
    return [source.path.removeprefix(f"{folder}/") for source in sources]


def test_folder_by_name_without_hidden_and_unknown_files(folder):
    sources = list_sources([str(folder)])
    assert names(sources, folder) == ["a.jsonl.gz", "b.txt", "sub/c.json", "z.parquet.zst"]
    assert sources[0] == Source(str(folder / "a.jsonl.gz"), "jsonl", ".gz", 1)
    assert [source.format for source in sources] == ["jsonl", "text", "json", "parquet"]


def test_a_prefix_that_was_written_there_is_no_input(folder):
    before = list_sources([str(folder)])
    for suffix in (".bin", ".idx", ".json"):
        (folder / f"out{suffix}").write_text("x")
    assert list_sources([str(folder)]) == before
    assert names(list_sources([f"{folder}/**/*.json"]), folder) == ["sub/c.json"]


def test_what_an_interrupted_run_left_there_is_no_input(folder):
    before = list_sources([str(folder)])
    partial = folder / "sub" / "out.partial"
    partial.mkdir()
    for name in ("plan.json", "journal.jsonl"):
        (partial / name).write_text("x")
    assert list_sources([str(folder)]) == before
    assert names(list_sources([f"{folder}/**/*.json"]), folder) == ["sub/c.json"]
    with pytest.raises(ValueError, match="only 1 x output of preprocessing$"):
        list_sources([f"{folder}/**/*.jsonl"])
    named = [str(partial), f"{partial}/*.json", str(partial / "plan.json")]  # whoever asks for them gets them
    assert names(list_sources(named), partial) == ["journal.jsonl", "plan.json"]


def test_more_suffixes_are_read_as_text(folder):
    sources = list_sources([str(folder)], text_suffixes=[".py", "md"])
    assert names(sources, folder) == ["a.jsonl.gz", "b.txt", "notes.md", "sub/c.json", "sub/d.py", "z.parquet.zst"]
    assert sources[2].format == "text"


def test_mixes_keep_their_order_and_read_a_file_once(folder):
    items = [str(folder / "sub" / "c.json"), str(folder / "*.txt"), "-", str(folder)]
    sources = list_sources(items, stdin_format="text")
    assert names(sources, folder) == ["sub/c.json", "b.txt", "-", "a.jsonl.gz", "z.parquet.zst"]
    assert sources[2] == Source("-", "text")


def test_a_file_with_two_names_is_read_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "link.txt").symlink_to(folder / "b.txt")
    items = ["sub/../b.txt", str(folder / "b.txt"), "link.txt", "./b.txt", "sub", "sub/c.json"]
    assert [source.path for source in list_sources(items)] == ["sub/../b.txt", "sub/c.json"]


@pytest.fixture
def linked(tmp_path):
    """A corpus with a linked folder, links that lead in circles, and what else is not read"""
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    for path in (corpus / "a.txt", corpus / "sub" / "c.txt", other / "b.txt", other / "deep" / "d.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (corpus / "linked").symlink_to("../other")
    (corpus / "again").symlink_to("sub")  # which is read under its own name
    for number in range(3):  # followed as they come, these have 3^40 paths
        (corpus / f"circle{number}").symlink_to(".")
        (other / "deep" / f"back{number}").symlink_to(corpus)
    return corpus


@pytest.mark.parametrize("item", ["", "/**/*.txt", "/**", "/**/**/*.txt", "*/**/*.txt"])
def test_linked_folders_are_read_and_circles_end(linked, item):
    sources = list_sources([f"{linked}{item}"])
    assert names(sources, linked) == ["a.txt", "linked/b.txt", "linked/deep/d.txt", "sub/c.txt"]


def test_a_recursive_glob_is_relative_and_takes_names_as_they_are(linked, monkeypatch):
    monkeypatch.chdir(linked)
    (linked / "odd [a]").mkdir()
    (linked / "odd [a]" / "e.txt").write_text("x")
    expected = ["a.txt", "linked/b.txt", "linked/deep/d.txt", "odd [a]/e.txt", "sub/c.txt"]
    assert [source.path for source in list_sources(["**/*.txt"])] == expected
    assert [source.path for source in list_sources(["linked/**/d*"])] == ["linked/deep/d.txt"]


def test_suffixes_in_upper_case_and_ndjson(tmp_path):
    for name in ("A.TXT", "b.ndjson", "c.Jsonl.GZ", "d.PY"):
        (tmp_path / name).write_text("x")
    sources = list_sources([str(tmp_path)], text_suffixes=[".py"])
    assert [(source.format, source.compression) for source in sources] == [
        ("text", ""),
        ("jsonl", ""),
        ("jsonl", ".gz"),
        ("text", ""),
    ]


def test_what_is_passed_over_is_counted(folder):
    (folder / "gone.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.txt")
    (folder / "README").write_text("x")
    for suffix in (".bin", ".idx", ".json"):
        (folder / f"out{suffix}").write_text("x")
    passed_over = Counter()
    assert len(list_sources([str(folder)], passed_over=passed_over)) == 4
    kinds = {"hidden": 2, "broken link": 1, "no regular file": 1, "without suffix": 1, "output of preprocessing": 1}
    assert passed_over == {**kinds, ".md": 1, ".py": 1, ".bin": 1, ".idx": 1}
    assert told(passed_over).startswith("1 x .bin, 1 x .idx, 1 x .md") and "2 x hidden" in told(passed_over)
    passed_over.clear()
    assert len(list_sources([f"{folder}/*[tz]"], passed_over=passed_over)) == 3
    assert passed_over == {"broken link": 1, "no regular file": 1}
    passed_over.clear()
    assert len(list_sources([f"{folder}/[bs]*"], passed_over=passed_over)) == 1 and passed_over == {"folder": 1}
    with pytest.raises(ValueError, match=r"--text-suffixes\); it holds 1 x without suffix"):
        (folder / "other").mkdir()
        (folder / "other" / "a").write_text("x")
        list_sources([str(folder / "other")])


def test_says_what_is_wrong(folder):
    for item, message in [
        (folder / "absent", "no such file or folder"),
        (folder / "*.csv", "nothing matches"),
        (folder / "notes.md", r"unknown suffix .md; known are .jsonl"),
        ("", "--input '': is empty"),
        (folder / "su?", "no file to read there, only 1 x folder; name the folder by itself$"),
        (folder / "pipe", "only 1 x no regular file; read a pipe by --input -$"),
    ]:
        if item and item.name == "pipe":
            os.mkfifo(item)
        with pytest.raises(ValueError, match=message):
            list_sources([str(item)])
    (folder / "sub" / "c.json").unlink()
    with pytest.raises(ValueError, match="no file in this folder ends in"):
        list_sources([str(folder / "sub")])


def test_saved_datasets(tmp_path):
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(ValueError, match="several splits: give .*/train or .*/test"):
        list_sources([str(tmp_path)])
    split = tmp_path / "train"
    split.mkdir()
    (split / "dataset_info.json").write_text("{}")
    for name in ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow"):
        (split / name).write_text("x")
    state = {"_data_files": [{"filename": f"data-0000{i}-of-00002.arrow"} for i in (0, 1)], "_indices_files": []}
    (split / "state.json").write_text(json.dumps(state))
    assert [source.format for source in list_sources([str(split)])] == ["arrow", "arrow"]
    for damaged, message in [
        (json.dumps({**state, "_indices_files": [{"filename": "i"}]}), "flatten_indices"),
        ("{}", "its state.json lists no data files"),
        ("[]", "its state.json is damaged"),
        ("{", "its state.json is damaged"),
    ]:
        (split / "state.json").write_text(damaged)
        with pytest.raises(ValueError, match=f"--input {split}.*{message}"):
            list_sources([str(split)])
