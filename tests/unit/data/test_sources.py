import json

import pytest

from mesh_megatron.data.sources import Source, list_sources


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
    with pytest.raises(ValueError, match="nothing matches"):
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


def test_says_what_is_wrong(folder):
    for item, message in [
        (folder / "absent", "no such file or folder"),
        (folder / "*.csv", "nothing matches"),
        (folder / "notes.md", r"what is in a .md\? Known are .jsonl"),
    ]:
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
    (split / "state.json").write_text(json.dumps({**state, "_indices_files": [{"filename": "i"}]}))
    with pytest.raises(ValueError, match="flatten_indices"):
        list_sources([str(split)])
