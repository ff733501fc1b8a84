"""benchmarks/optimizers.py: cells are runs that the trainer accepts; the table compares inside a seed."""

from __future__ import annotations

from benchmarks.optimizers import OPTIMIZERS, Arguments, Row, cell, markdown

ARGUMENTS = Arguments(train_iters=10)


def test_cells_are_matched_runs():
    found = [cell(ARGUMENTS, "base", name, rate, 1) for name in OPTIMIZERS for rate in ARGUMENTS.rates(name)]
    assert len({(each.setup, each.seed) for each in found}) == len(found) == 6
    runs = [each.run() for each in found]
    assert [run.training.optimizer for run in runs] == ["adam"] * 3 + ["muon"] * 3
    assert [run.training.lr for run in runs] == [*ARGUMENTS.adamw_rates, *ARGUMENTS.muon_rates]
    assert len({(run.training.batch_size(1), run.training.train_iters, str(run.model)) for run in runs}) == 1


def test_muon_is_compared_with_adamw_inside_each_seed():
    adamw = Row("base", "AdamW", 0.002, {0.001: 3.2, 0.002: 3.1}, {1: 3.0, 2: 4.0})
    muon = Row("base", "Muon", 0.004, {0.004: 3.0}, {1: 2.9, 2: 3.9})
    head, _, first, second = markdown([adamw, muon])
    assert first == "| base | AdamW | 0.001: 3.200, 0.002: 3.100 | 0.002 | 3.5000 | 0.7071 | | | 2 |"
    assert second == "| base | Muon | 0.004: 3.000 | 0.004 | 3.4000 | 0.7071 | -0.1000 | -0.1000 to -0.1000 | 2 |"
    assert head.count("|") == first.count("|") == second.count("|")


def test_seeds_that_are_missing_are_left_out():
    adamw = Row("base", "AdamW", 0.002, {0.002: 3.1}, {1: 3.0})
    assert markdown([adamw])[2].split(" | ")[4:6] == ["3.0000", "-"]
    assert markdown([Row("base", "Muon", 0.002, {0.002: 3.1}, {})])[2].split(" | ")[4:6] == ["-", "-"]
