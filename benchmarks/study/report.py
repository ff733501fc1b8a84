"""The result of a study as files: a table to read, the same as JSON, and figures."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from benchmarks.study import figures
from benchmarks.study.compare import CellResult, Difference, Row, admitted, promoted, read_results, rows
from benchmarks.study.grid import Gate, Grid

HEAD = """\
| scheme | parameters | layers, computed | loss | spread | - {reference} | 95% interval | seeds |
|---|---|---|---|---|---|---|---|"""


def write(grid: Grid, output: Path) -> None:
    """``study_GRID.md``, ``.json`` and ``_*.png`` under ``output``, from the cells that are done; prints the table."""
    results = read_results(grid, output)
    table = rows(grid, results)
    text = markdown(grid, table, results)
    print(text)
    record = to_json(grid, table, results)
    stem = output / f"study_{grid.name}"
    for path, content in ((stem.with_suffix(".md"), text), (stem.with_suffix(".json"), record)):
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(content + "\n", encoding="utf-8")
        temporary.replace(path)
    written = figures.draw(grid, table, results, stem)
    print(f"wrote {', '.join(str(path) for path in (stem.with_suffix('.md'), stem.with_suffix('.json'), *written))}")


def markdown(grid: Grid, table: list[Row], results: list[CellResult]) -> str:
    """A table a setup, best loss first, and what is missing."""
    lines = []
    for setup in dict.fromkeys(row.setup for row in table):
        mine = sorted((row for row in table if row.setup == setup), key=lambda row: row.mean)
        first = next(result for result in results if result.cell.setup == setup and result.facts)
        tokens = first.cell.iterations * first.tokens_per_step
        lines += [f"{setup}: {tokens:,} tokens, {mine[0].flops:.3g} FLOPs a model", ""]
        lines += [HEAD.format(reference=grid.reference), *(_line(row) for row in mine), ""]
    open_cells = {cell for stage in grid.stages for cell in admitted(grid, stage, results)}
    for stage in grid.stages:
        if stage.gate is not None:
            lines += [_passage(stage.gate, promoted(grid, stage, results)), ""]
    missing = [result for result in results if result.loss is None and result.cell in open_cells]
    if missing:
        lines.append(f"Missing, {len(missing)} of {len(open_cells)} cells: {'; '.join(_groups(missing, results))}.")
    return "\n".join(lines).strip()


def _groups(missing: list[CellResult], results: list[CellResult]) -> list[str]:
    """Name missing cells by scheme, and setups of which there is nothing at all by their number of cells."""
    begun = {result.cell.setup for result in results if result.curve}
    seeds: dict[str, list[str]] = {}
    for result in missing:
        if result.cell.setup in begun:
            name = f"{result.cell.setup}/{result.cell.scheme} seed"
            seeds.setdefault(name, []).append(f"{result.cell.seed}{_progress(result)}")
    others = Counter(result.cell.setup for result in missing if result.cell.setup not in begun)
    named = [f"{name} {' and '.join(which)}" for name, which in seeds.items()]
    return named + [f"all {count} of {setup}" for setup, count in others.items()]


def _passage(gate: Gate, through: list[str] | None) -> str:
    if through is None:
        return f"Not decided before all cells of {gate.setup} are trained: which schemes go on from it."
    return f"From {gate.setup} go on: {', '.join(through)}."


def _line(row: Row) -> str:
    spread = f"{row.spread:.4f}" if row.spread is not None else "-"
    layers = f"{row.unique_layers}, {row.computed_layers}"
    difference = _difference(row.difference)
    return (
        f"| {row.scheme} | {row.parameters:,} | {layers} | {row.mean:.4f} | {spread} | {difference} "
        f"| {len(row.losses)} |"
    )


def _difference(difference: Difference | None) -> str:
    """Two columns."""
    if difference is None:
        return "| "
    if difference.half_width is None:
        return f"{difference.mean:+.4f} | one seed"
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    return f"{difference.mean:+.4f} | {low:+.4f} to {high:+.4f}"


def _progress(result: CellResult) -> str:
    return f" ({result.curve[-1][0]} of {result.cell.iterations} steps)" if result.curve else ""


def to_json(grid: Grid, table: list[Row], results: list[CellResult]) -> str:
    """Everything the table and the figures show, a line for each row and each cell."""
    lists = {
        "rows": [asdict(row) | {"mean": row.mean, "spread": row.spread} for row in table],
        "cells": [
            {
                "setup": result.cell.setup,
                "scheme": result.cell.scheme,
                "seed": result.cell.seed,
                "loss": result.loss,
                "validation": [[iteration * result.tokens_per_step, loss] for iteration, loss in result.curve],
                "read_entropies": [[step * result.tokens_per_step, found] for step, found in result.read_entropies()],
                "last_reads": result.last_reads(),
            }
            for result in results
        ],
    }
    parts = [f'"grid": {json.dumps(grid.name)}', f'"reference": {json.dumps(grid.reference)}']
    for name, items in lists.items():
        lines = ",\n".join(json.dumps(item) for item in items)
        parts.append(f'"{name}": [\n{lines}\n]')
    return "{\n" + ",\n".join(parts) + "\n}"
