"""Output of tools/checkpoint.py for folders that no run leaves behind."""

import json
import shutil
from pathlib import Path

import pytest

from mesh_megatron.checkpoint.folder import CONFIG, TRACKER, folder_of, saved_iterations
from mesh_megatron.checkpoint.manifest import find_damage, seal
from mesh_megatron.commands.checkpoint import Diff, List, Prune, Verify


@pytest.fixture
def save(tmp_path) -> Path:
    for iteration in (10, 20, 30):
        folder = folder_of(tmp_path, iteration)
        folder.mkdir()
        (folder / "__0_0.distcp").write_bytes(bytes(100))
        (folder / CONFIG).write_text(json.dumps({"resolved": {"consumed_tokens": iteration}}))
        seal(folder)
    (tmp_path / TRACKER).write_text("30\n")
    return tmp_path


def listed(save: Path, capsys) -> tuple[list[str], list[str]]:
    """The rows that are marked, and the lines after all rows."""
    List(save)()
    _, *lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line[2:].lstrip()[:2] in ("10", "20", "30")]
    return [row.split()[1] for row in rows if row.startswith("*")], lines[len(rows) :]


@pytest.mark.parametrize(
    ("tracker", "marked", "note"),
    [
        ("30", "30", None),
        ("500", "30", "iter_0000500 is not intact: there is no such folder"),
        ("x", "30", "holds 'x', not an iteration"),
        ("\u00b2", "30", "holds '\u00b2', not an iteration"),
        (None, "30", f"{TRACKER} is missing"),
    ],
)
def test_the_one_that_is_marked_is_the_one_to_start_from(save, capsys, tracker, marked, note):
    (save / TRACKER).unlink()
    if tracker is not None:
        (save / TRACKER).write_text(tracker, encoding="utf-8")
    stars, notes = listed(save, capsys)
    assert stars == [marked] and notes[-1] == "* is the one to continue from"
    assert note is None or (note in notes[0] and notes[-2] == f"starting from {folder_of(save, 30)} instead")


def test_of_damaged_ones_none_is_marked(save, capsys):
    (folder_of(save, 30) / "__0_0.distcp").write_bytes(b"")
    assert listed(save, capsys)[0] == ["20"]
    for iteration in (10, 20):
        (folder_of(save, iteration) / "__0_0.distcp").unlink()
    stars, notes = listed(save, capsys)
    assert not stars and notes[0].startswith("no checkpoint to start from: ")
    assert notes[-1] == "none of these is one to continue from"


def test_a_checkpoint_is_known_by_any_name(save, capsys):
    (save / "latest").symlink_to(folder_of(save, 20))
    copy = Path(shutil.copytree(folder_of(save, 10), save / "of the paper"))
    for path in (save / "latest", copy):
        assert Verify(path)() == 0 and capsys.readouterr().out == f"{path}: intact\n"
        assert List(path)() == 0
        title, row = capsys.readouterr().out.splitlines()
        assert row.endswith("intact") and (path == copy or row.split()[0] == "20")


def test_links_and_foreign_names_in_a_save_folder(save, capsys, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk") / "old"
    folder_of(save, 10).rename(elsewhere)
    folder_of(save, 10).symlink_to(elsewhere)
    (save / "iter_20").mkdir()  # named by hand: no run would load it
    (save / "iter_0000040").write_text("a file")
    (save / "iter_0000050.old").mkdir()
    assert saved_iterations(save) == [10, 20, 30]
    assert Prune(save=save, keep_last=1)() == 0
    assert capsys.readouterr().out.count("deleted ") == 2 and saved_iterations(save) == [30]
    assert find_damage(elsewhere, "hash") == []  # only the link is gone
    assert (save / "iter_20").is_dir()


def test_a_message_names_no_flag_that_diff_does_not_have(save, tmp_path):
    (save / TRACKER).unlink()
    with pytest.raises(ValueError, match=f"^{save}: no {TRACKER} there; give one that is there: .*/iter_0000010, "):
        Diff(first=save, second=save)()
