"""Output folders that appear complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh_megatron.util.staged_folder import staged_folder


@pytest.mark.parametrize("error", [OSError("busy"), KeyboardInterrupt()])
def test_a_replaced_folder_comes_back_if_the_new_one_cannot_be_put_there(tmp_path, monkeypatch, error):
    output, rename = tmp_path / "export", Path.rename
    output.mkdir()
    (output / "config.json").write_text("old")

    def failing(path, target):
        if path.name.endswith(".new"):
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(error)), staged_folder(output, force=True, mark="config.json") as folder:
        (folder / "config.json").write_text("new")
    assert (output / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]
