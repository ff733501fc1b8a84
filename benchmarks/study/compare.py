"""Losses of a study put together: mean and spread over seeds, difference to the reference inside each seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.study.grid import Cell, Grid, Stage
from benchmarks.study.run import records, validation_curve

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
    probes: tuple[dict[str, Any], ...] = ()
    """Records of ``--probe-interval`` that have routers."""

    @property
    def loss(self) -> float | None:
        """Loss after the last step; None until the cell is done."""
        return dict(self.curve).get(self.cell.iterations)

    def read_entropies(self) -> list[tuple[int, list[float]]]:
        """(iteration, mean entropy in nats of a token's read weights in each cycle)."""
        return [(probe["iteration"], _by_cycle(probe, "router read entropy")) for probe in self.probes]

    def last_reads(self) -> list[list[float]]:
        """Mean read weights [cycle][slot] at the last probe; empty without routers."""
        last = self.probes[-1] if self.probes else {}
        cycles = range(len(_by_cycle(last, "router read entropy")))
        return [[v for k, v in last.items() if k.startswith(f"router read/cycle {cycle} slot ")] for cycle in cycles]

    @property
    def tokens_per_step(self) -> int:
        return int(self.facts["tokens_per_step"]) if self.facts else 0


def _by_cycle(probe: dict[str, Any], name: str) -> list[float]:
    return [value for key, value in probe.items() if key.startswith(f"{name}/cycle ")]


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
        probes = tuple(record for record in records(folder, cell) if _by_cycle(record, "router read entropy"))
        results.append(CellResult(cell, validation_curve(folder, cell), facts, probes))
    return results


def promoted(grid: Grid, stage: Stage, results: list[CellResult]) -> list[str] | None:
    """Return the schemes that may be trained in a stage: all without a gate, with one the best first.

    None while a cell is missing that earlier stages train in the gate's setup.
    """
    gate = stage.gate
    if gate is None:
        return list(dict.fromkeys(cell.scheme for cell in stage.cells))
    earlier = {cell for before in grid.stages[: grid.stages.index(stage)] for cell in before.cells}
    measured = [result for result in results if result.cell.setup == gate.setup and result.cell in earlier]
    if any(result.loss is None for result in measured):
        return None
    schemes = dict.fromkeys(result.cell.scheme for result in measured)
    means = {scheme: statistics.mean(losses_at(measured, gate.setup, scheme).values()) for scheme in schemes}
    ranked = [scheme for scheme in sorted(means, key=means.__getitem__) if scheme not in gate.always]
    return [*gate.always, *ranked[: gate.best]]


def admitted(grid: Grid, stage: Stage, results: list[CellResult]) -> list[Cell]:
    """Return the cells of a stage that may be trained now."""
    through = promoted(grid, stage, results) or []
    return [cell for cell in stage.cells if cell.scheme in through]


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
