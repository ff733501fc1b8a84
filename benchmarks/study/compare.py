"""Losses of a study put together: mean and spread over seeds, difference to the reference inside each seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.study.grid import Cell, Grid
from benchmarks.study.run import validation_curve

Losses = Mapping[int, float]


@dataclass(frozen=True)
class Difference:
    """Mean over seeds of scheme minus reference, each pair of one seed (same data order, same shared weights)."""

    mean: float
    half_width: float | None
    """Half the width of the 95% confidence interval, by Student's t over the pairs; None for a single pair."""
    pairs: int

    @property
    def clear(self) -> bool:
        """True if the interval does not contain zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def paired_difference(ours: Losses, reference: Losses) -> Difference | None:
    """Return the difference over the seeds that both have; None if there are none."""
    pairs = [ours[seed] - reference[seed] for seed in sorted(ours.keys() & reference.keys())]
    if not pairs:
        return None
    if len(pairs) == 1:
        return Difference(pairs[0], None, 1)
    standard_error = statistics.stdev(pairs) / len(pairs) ** 0.5
    return Difference(statistics.mean(pairs), float(stats.t.ppf(0.975, len(pairs) - 1)) * standard_error, len(pairs))


@dataclass(frozen=True)
class CellResult:
    """Present results of a cell."""

    cell: Cell
    curve: list[tuple[int, float]]
    """(iteration, validation loss)."""
    facts: dict[str, Any] | None
    """The trainer's ``--summary-json``; None before the cell was started."""

    @property
    def loss(self) -> float | None:
        """Loss after the last step; None until the cell is done."""
        return dict(self.curve).get(self.cell.iterations)

    @property
    def tokens_per_step(self) -> int:
        return int(self.facts["tokens_per_step"]) if self.facts else 0


@dataclass(frozen=True)
class Row:
    """One scheme in one setup."""

    setup: str
    scheme: str
    losses: dict[int, float]
    """Seed -> final validation loss, of the cells that are done."""
    difference: Difference | None
    parameters: int
    non_embedding: int
    unique_layers: int
    computed_layers: int
    flops: int
    """FLOPs of one cell's training."""

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for a single one."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None


def read_results(grid: Grid, folder: Path) -> list[CellResult]:
    """Every cell of the grid, in its order."""
    results = []
    for cell in grid.cells:
        summary = folder / cell.name / "summary.json"
        facts = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else None
        results.append(CellResult(cell, validation_curve(folder, cell), facts))
    return results


def losses_at(results: list[CellResult], setup: str, scheme: str, iteration: int | None = None) -> dict[int, float]:
    """Seed -> validation loss after ``iteration``, default after the last step."""
    mine = [result for result in results if (result.cell.setup, result.cell.scheme) == (setup, scheme)]
    found = {r.cell.seed: dict(r.curve).get(iteration or r.cell.iterations) for r in mine}
    return {seed: loss for seed, loss in found.items() if loss is not None}


def rows(grid: Grid, results: list[CellResult]) -> list[Row]:
    """A row for each setup and scheme that has a done cell, in the grid's order."""
    table = {}
    for result in results:
        setup, scheme, facts = result.cell.setup, result.cell.scheme, result.facts
        if result.loss is None or facts is None or (setup, scheme) in table:
            continue
        losses = losses_at(results, setup, scheme)
        difference = paired_difference(losses, losses_at(results, setup, grid.reference))
        table[setup, scheme] = Row(
            setup, scheme, losses, None if scheme == grid.reference else difference,
            parameters=facts["parameters"]["total"], non_embedding=facts["parameters"]["non_embedding"],
            unique_layers=facts["unique_layers"], computed_layers=facts["computed_layers"], flops=facts["total_flops"],
        )  # fmt: skip
    return list(table.values())
