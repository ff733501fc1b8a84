"""benchmarks/optimizers.py: its cells are runs that the trainer accepts, and its table takes the best rate."""

from __future__ import annotations

from benchmarks.optimizers import Arguments, cells, markdown, table

ARGUMENTS = Arguments(schemes=("base",), seeds=(1, 2), adamw_rates=(1e-3, 2e-3), muon_rates=(4e-3,), train_iters=10)


def test_cells_are_matched_runs():
    found = list(cells(ARGUMENTS))
    assert [(cell.setup, cell.seed) for cell in found] == [
        *(("AdamW 0.001", 1), ("AdamW 0.002", 1), ("Muon 0.004", 1)),
        *(("AdamW 0.001", 2), ("AdamW 0.002", 2), ("Muon 0.004", 2)),
    ]
    runs = [cell.run() for cell in found]
    assert [run.training.optimizer for run in runs] == ["adam", "adam", "muon"] * 2
    assert len({(run.training.batch_size(1), run.training.train_iters, str(run.model)) for run in runs}) == 1


def test_the_best_rate_is_that_of_the_mean():
    losses = dict(zip(cells(ARGUMENTS), (3.0, 4.0, 3.5, 5.0, 3.0, 3.0), strict=True))
    rows = table(ARGUMENTS, losses)
    assert [(row["optimizer"], row["best"]) for row in rows] == [("AdamW", "0.002"), ("Muon", "0.004")]
    assert markdown(rows)[2] == "| base | AdamW | 0.002 | 3.5000 | 0.7071 | 0.001: 4.000, 0.002: 3.500 |"


def test_what_is_missing_is_left_out():
    (first, *_) = cells(ARGUMENTS)
    (row,) = table(ARGUMENTS, {first: 3.0})
    assert markdown([row])[2].split(" | ")[3:5] == ["3.0000", "-"]
