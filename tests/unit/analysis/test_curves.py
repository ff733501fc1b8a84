"""tools/plot_metrics.py draws every run that it is given, or says in a line why not."""

import json
import sys
from pathlib import Path

import pytest

from mesh_megatron.analysis import curves
from mesh_megatron.analysis.labels import names_of
from mesh_megatron.commands import plot_metrics


def write_metrics(folder: Path) -> Path:
    folder.mkdir(parents=True)
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps({"iteration": i, "lm loss": 4 - i}) + "\n" for i in range(3)))
    return file


def run_tool(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["plot_metrics.py", *map(str, words)])
    return plot_metrics.main()


def test_names_of_folders():
    assert names_of([Path("m/a"), Path("m/b")]) == ["a", "b"]
    assert names_of([Path("m/a/run"), Path("m/b/run")]) == ["m/a/run", "m/b/run"]


def test_runs_of_one_name_are_all_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = [write_metrics(tmp_path / name / "run") for name in "ab"]
    drawn: dict[str, Path] = {}
    monkeypatch.setattr(curves, "plot_losses", lambda runs, output: drawn.update(runs))
    assert run_tool(monkeypatch, *files) == 0
    assert drawn == {str(file.parent): file for file in files}


def test_lines_of_several_validation_sets_can_be_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = [write_metrics(tmp_path / name) for name in "ab"]
    sets = {f"lm loss validation {name}": 3.0 for name in ("wiki", "code", "books")}
    for file in files:
        file.write_text(file.read_text() + json.dumps({"iteration": 2, **sets, "lm loss test": 3.0}) + "\n")
    drawn: list[list[tuple]] = []
    monkeypatch.setattr(
        curves.plt, "close", lambda figure: drawn.append([(line.get_color(), line.get_linestyle()) for line in
                                                         figure.axes[0].get_lines()])
    )  # fmt: skip
    assert run_tool(monkeypatch, *files, "--output", tmp_path / "loss.svg") == 0
    (lines,) = drawn
    assert len(lines) == len(set(lines)) == 10


def test_the_figures_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figure = tmp_path / "new" / "loss.png"
    assert run_tool(monkeypatch, write_metrics(tmp_path / "run"), "--output", figure) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    vectors = tmp_path / "loss.svg"
    assert run_tool(monkeypatch, tmp_path / "run", "--output", vectors) == 0  # the run's folder will do
    assert b"<svg" in vectors.read_bytes()


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    file = write_metrics(tmp_path / "run")
    for words, complaint in [
        ((file, "--output", tmp_path), f"--output {tmp_path}: is a folder; name a file"),
        ((file, "--output", file / "x.png"), f"{file} cannot be written to (Not a directory); name another place"),
        ((file, file), "two files are in the same folder; give one file per run"),
        ((file, file.parent), "two files are in the same folder; give one file per run"),
        ((), "no runs: give one metrics.jsonl per run"),
        ((file, "--output", tmp_path / "loss"), "loss: not a figure format; use .png, .svg or .pdf"),
        ((file, "--output", tmp_path / "loss.gifx"), "loss.gifx: not a figure format; use .png, .svg or .pdf"),
        ((tmp_path,), f"{tmp_path}/metrics.jsonl"),
    ]:
        assert run_tool(monkeypatch, *words) == 2
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1
