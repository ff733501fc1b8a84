"""Statistics of a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from benchmarks.study import report
from benchmarks.study.compare import CellResult, admitted, paired_difference, promoted, rows
from benchmarks.study.grid import Cell, Corpus, Gate, Grid, Stage

ROOT = Path(__file__).parents[3]
SETTINGS = {"training": {"train_iters": 20}}
FACTS = {
    "parameters": {"total": 1000, "non_embedding": 600},
    "unique_layers": 3, "computed_layers": 4, "total_flops": 10**6, "tokens_per_step": 64,
}  # fmt: skip


def results(losses: dict[str, dict[int, float]]) -> list[CellResult]:
    """Cells that lose 1 on the way from step 10 to step 20."""
    return [
        CellResult(Cell("d16", scheme, seed, SETTINGS), [(10, loss + 1), (20, loss)], FACTS)
        for scheme, seeds in losses.items()
        for seed, loss in seeds.items()
    ]


def grid_of(cells: list[CellResult]) -> Grid:
    only = tuple(result.cell for result in cells)
    return Grid(name="g", corpus=Corpus(), reference="base", stages=(Stage(only),), scaling=(), shown=())


def test_the_interval_is_that_of_the_paired_t_test():
    ours, base = {1: 2.91, 2: 2.85, 3: 3.02, 4: 2.88}, {1: 2.95, 2: 2.88, 3: 3.01, 4: 2.99}
    difference = paired_difference(ours, base)
    interval = stats.ttest_rel(list(ours.values()), list(base.values())).confidence_interval(0.95)
    assert difference.mean - difference.half_width == pytest.approx(interval.low)
    assert difference.mean + difference.half_width == pytest.approx(interval.high)


def test_three_pairs_by_hand():
    difference = paired_difference({1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.1, 2: 2.2, 3: 3.3})
    assert difference.mean == pytest.approx(-0.2) and difference.pairs == 3
    assert difference.half_width == pytest.approx(4.302653 * 0.1 / 3**0.5)  # t of 2 degrees of freedom, 97.5%
    assert not difference.clear
    assert paired_difference({1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.2, 2: 2.2, 3: 3.21}).clear


def test_only_seeds_that_both_have_are_paired():
    assert paired_difference({1: 2.0, 2: 9.0}, {1: 1.5, 3: 7.0}).mean == 0.5
    assert paired_difference({1: 2.0, 2: 9.0}, {1: 1.5, 3: 7.0}).half_width is None
    assert paired_difference({1: 2.0}, {2: 1.0}) is None


def test_rows_have_mean_spread_and_difference():
    cells = results({"base": {1: 2.0, 2: 3.0}, "mesh": {1: 1.9, 2: 2.7}})
    base, mesh = rows(grid_of(cells), cells)
    assert (base.scheme, base.mean, base.difference) == ("base", 2.5, None)
    assert base.spread == pytest.approx(0.5**0.5)
    assert mesh.difference.mean == pytest.approx(-0.2) and mesh.difference.pairs == 2
    assert (mesh.parameters, mesh.unique_layers, mesh.computed_layers) == (1000, 3, 4)


def test_a_study_that_is_not_complete_says_what_is_missing(tmp_path, monkeypatch, capsys):
    cells = results({"base": {1: 2.0, 2: 3.0}, "mesh": {1: 1.9}})
    half, none = Cell("d16", "mesh", 2, SETTINGS), Cell("d16", "anchor", 1, SETTINGS)
    other = Cell("d16", "anchor", 2, SETTINGS)
    cells += [CellResult(half, [(10, 3.5)], FACTS), CellResult(none, [], None), CellResult(other, [], None)]
    monkeypatch.setattr(report, "read_results", lambda grid, folder: cells)
    report.write(grid_of(cells), tmp_path)
    text = (tmp_path / "study_g.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "Missing, 3 of 6 cells: d16/mesh seed 2 (10 of 20 steps); d16/anchor seed 1 and 2." in text
    assert "| mesh | 1,000 | 3, 4 | 1.9000 | - | -0.1000 | one seed | 1 |" in text
    assert text.index("| mesh |") < text.index("| base |"), "best first"
    record = json.loads((tmp_path / "study_g.json").read_text())
    assert record["cells"][0]["validation"] == [[640, 3.0], [1280, 2.0]] and record["cells"][3]["loss"] is None
    assert {path.name for path in tmp_path.glob("*.png")} == {"study_g_curves.png", "study_g_differences.png"}


def test_a_gate_lets_the_best_through():
    cells = results({"base": {1: 2.0, 2: 3.0}, "good": {1: 1.0, 2: 2.0}, "lucky": {1: 0.5, 2: 4.0}})
    wide = [Cell("d32", scheme, 1, SETTINGS) for scheme in ("base", "good", "lucky")]
    first, second = Stage(grid_of(cells).cells), Stage(tuple(wide), Gate(setup="d16", best=1, always=("base",)))
    grid = Grid(name="g", corpus=Corpus(), reference="base", stages=(first, second), scaling=(), shown=())
    everything = cells + [CellResult(cell, [], None) for cell in wide]
    assert promoted(grid, second, everything) == ["base", "good"]
    assert admitted(grid, first, everything) == list(first.cells)
    assert admitted(grid, second, everything) == wide[:2]
    text = report.markdown(grid, rows(grid, everything), everything)
    assert "From d16 go on: base, good." in text and "Missing, 2 of 8 cells: all 2 of d32." in text


def test_a_gate_waits_for_every_cell_of_its_setup():
    cells = results({"base": {1: 2.0}, "good": {1: 1.0}})
    cells.append(CellResult(Cell("d16", "good", 2, SETTINGS), [(10, 2.0)], FACTS))
    wide = Stage((Cell("d32", "good", 1, SETTINGS),), Gate(setup="d16", best=1))
    first = Stage(tuple(result.cell for result in cells))
    grid = Grid(name="g", corpus=Corpus(), reference="base", stages=(first, wide), scaling=(), shown=())
    assert admitted(grid, wide, cells) == []
    text = report.markdown(grid, rows(grid, cells), cells)
    assert "Not decided before all cells of d16 are trained" in text and "Missing, 1 of 3 cells" in text


def test_entropies_of_reads_are_reported(tmp_path, monkeypatch):
    probe = {"iteration": 10, "router read entropy/cycle 0": 1.5, "router read entropy/cycle 1": 0.25}
    probe |= {f"router read/cycle {cycle} slot {slot}": 0.5 - slot for cycle in (0, 1) for slot in (0, 1)}
    cells = results({"base": {1: 2.0}, "mesh": {1: 1.9}})
    cells[1] = CellResult(cells[1].cell, cells[1].curve, FACTS, (probe,))
    monkeypatch.setattr(report, "read_results", lambda grid, folder: cells)
    report.write(grid_of(cells), tmp_path)
    base, mesh = json.loads((tmp_path / "study_g.json").read_text())["cells"]
    assert mesh["read_entropies"] == [[640, [1.5, 0.25]]] and mesh["last_reads"] == [[0.5, -0.5]] * 2
    assert base["read_entropies"] == base["last_reads"] == []
    assert (tmp_path / "study_g_entropy.png").exists()


@pytest.mark.parametrize("grid", ["small", "routers", "confirmation", "schemes"])
def test_the_document_shows_the_committed_table(grid):
    table = (ROOT / f"benchmarks/results/study_{grid}.md").read_text().strip()
    record = json.loads((ROOT / f"benchmarks/results/study_{grid}.json").read_text())
    assert table in (ROOT / "docs/study.md").read_text()
    for row in record["rows"]:
        assert f"| {row['scheme']} | {row['parameters']:,} |" in table and f" {row['mean']:.4f} |" in table
