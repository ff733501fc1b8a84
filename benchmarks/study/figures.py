"""Figures of a study: differences to the reference, loss over training, loss over size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, on any machine
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.study.compare import CellResult, Row, losses_at, paired_difference  # noqa: E402
from benchmarks.study.grid import Grid  # noqa: E402

LOSS = "validation loss (nats a token)"


def draw(grid: Grid, table: list[Row], results: list[CellResult], stem: Path) -> list[Path]:
    """``STEM_differences``, ``_curves``, ``_entropy`` and ``_scaling.png``, as far as cells are there for them."""
    written = []
    setups = [setup for setup in dict.fromkeys(row.setup for row in table) if _compared(table, setup)]
    if setups:
        written.append(_save(_differences(grid, table, setups), stem, "differences"))
    if any(len(result.curve) > 1 for result in results):
        written.append(_save(_curves(grid, results), stem, "curves"))
    if any(result.probes for result in results):
        written.append(_save(_entropies(grid, results), stem, "entropy"))
    sizes = [setup for setup in grid.scaling if any(row.setup == setup for row in table)]
    if len(sizes) > 1:
        written.append(_save(_scaling(grid, table, sizes), stem, "scaling"))
    return written


def _compared(table: list[Row], setup: str) -> list[Row]:
    """Rows of a setup with a difference to the reference, best last (drawn on top)."""
    mine = [(row.difference.mean, row) for row in table if row.setup == setup and row.difference is not None]
    return [row for _, row in sorted(mine, key=lambda pair: -pair[0])]


def _differences(grid: Grid, table: list[Row], setups: Sequence[str]) -> Figure:
    """One panel a setup: every seed's difference, their mean, its 95% interval."""
    counts = [len(_compared(table, setup)) for setup in setups]
    size = 6.5, 1.0 + sum(0.27 * count + 0.45 for count in counts)
    ratios = [count + 0.8 for count in counts]
    figure, panels = plt.subplots(len(setups), figsize=size, squeeze=False, sharex=True, height_ratios=ratios)
    for axes, setup in zip(panels[:, 0], setups, strict=True):
        mine = _compared(table, setup)
        reference = losses_at_end(table, setup, grid.reference)
        for place, row in enumerate(mine):
            assert row.difference is not None
            color = "0.35" if not row.difference.clear else "C0" if row.difference.mean < 0 else "C3"
            seeds = [row.losses[seed] - reference[seed] for seed in row.losses if seed in reference]
            axes.plot(seeds, [place] * len(seeds), "o", color=color, markersize=3.5, alpha=0.5, markeredgewidth=0)
            mean, half_width = row.difference.mean, row.difference.half_width
            axes.errorbar(mean, place, xerr=half_width, fmt="|", color=color, capsize=3, markersize=9)
        axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.set(yticks=range(len(mine)), yticklabels=[row.scheme for row in mine], ylim=(-0.7, len(mine) - 0.3))
        axes.set_title(setup, fontsize=10)
        axes.grid(axis="x", alpha=0.25)
    panels[-1, 0].set_xlabel(f"validation loss minus {grid.reference} of the same seed (nats a token)")
    return figure


def losses_at_end(table: list[Row], setup: str, scheme: str) -> dict[int, float]:
    """Final losses of one row; empty where there is no such row."""
    return next((row.losses for row in table if (row.setup, row.scheme) == (setup, scheme)), {})


def _curves(grid: Grid, results: list[CellResult]) -> Figure:
    """Loss of the first setup over tokens (mean over seeds), and its difference to the reference inside seeds."""
    setup = results[0].cell.setup
    mine = [result for result in results if result.cell.setup == setup and result.curve]
    schemes = [s for s in dict.fromkeys(r.cell.scheme for r in mine) if not grid.shown or s in grid.shown]
    steps = sorted({iteration for result in mine for iteration, _ in result.curve})
    tokens_per_step = mine[0].tokens_per_step
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.0))
    for scheme in schemes:
        color = _color(grid, scheme, schemes)
        means, gaps = [], []
        for step in steps:
            ours, base = (losses_at(results, setup, name, step) for name in (scheme, grid.reference))
            if ours:
                means.append((step * tokens_per_step / 1e6, sum(ours.values()) / len(ours)))
            difference = paired_difference(ours, base)
            if difference is not None:
                gaps.append((step * tokens_per_step / 1e6, difference.mean))
        left.plot(*zip(*means, strict=True), color=color, label=scheme, linewidth=1.4)
        if gaps:
            right.plot(*zip(*gaps, strict=True), color=color, label=scheme, linewidth=1.4, marker="o", markersize=3)
    left.set(xlabel="million tokens", ylabel=LOSS, title=setup)
    right.set(xlabel="million tokens", ylabel=f"minus {grid.reference} of the same seed", title="difference")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    left.legend(fontsize=8, frameon=False)
    return figure


def _entropies(grid: Grid, results: list[CellResult]) -> Figure:
    """Entropy of the reads of each cycle over tokens, a panel a cycle: the first setup's mean over seeds."""
    setup = next(result.cell.setup for result in results if result.probes)
    mine = [result for result in results if result.cell.setup == setup and result.probes]
    schemes = [s for s in dict.fromkeys(r.cell.scheme for r in mine) if not grid.shown or s in grid.shown]
    cycles = len(mine[0].read_entropies()[0][1])
    figure, panels = plt.subplots(1, cycles, figsize=(1.0 + 3.2 * cycles, 3.6), squeeze=False, sharey=True)
    for number, scheme in enumerate(schemes):
        found: dict[int, list[list[float]]] = {}
        for result in mine:
            for step, entropies in result.read_entropies() if result.cell.scheme == scheme else []:
                found.setdefault(step * result.tokens_per_step, []).append(entropies)
        for cycle, axes in enumerate(panels[0]):
            means = [sum(e[cycle] for e in seeds) / len(seeds) for seeds in found.values()]
            axes.plot([tokens / 1e6 for tokens in found], means, color=f"C{number % 10}", label=scheme, linewidth=1.4)
    for cycle, axes in enumerate(panels[0]):
        axes.set(xlabel="million tokens", title=f"read of cycle {cycle}")
        axes.grid(alpha=0.25)
    panels[0, 0].set_ylabel(f"entropy of read weights (nats), {setup}")
    panels[0, 0].legend(fontsize=8, frameon=False)
    return figure


def _scaling(grid: Grid, table: list[Row], sizes: Sequence[str]) -> Figure:
    """Final loss over parameters, a line a scheme, and its difference to the reference with 95% intervals."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.0))
    mine = [row for row in table if row.setup in sizes]
    schemes = [s for s in dict.fromkeys(row.scheme for row in mine) if sum(row.scheme == s for row in mine) > 1]
    for scheme in schemes:
        ours = sorted((row for row in mine if row.scheme == scheme), key=lambda row: row.parameters)
        parameters, color = [row.parameters for row in ours], _color(grid, scheme, schemes)
        left.plot(parameters, [row.mean for row in ours], color=color, label=scheme, marker="o", markersize=4)
        if scheme != grid.reference:
            gaps = [row.difference for row in ours if row.difference is not None]
            widths = [gap.half_width or 0.0 for gap in gaps]
            means = [gap.mean for gap in gaps]
            right.errorbar(parameters, means, yerr=widths, color=color, marker="o", markersize=4, capsize=3)
    right.axhline(0, color="black", linewidth=1.2)
    left.set(ylabel=LOSS, title="loss")
    right.set(ylabel=f"minus {grid.reference} of the same seed", title="difference, 95% interval")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="parameters")
        axes.grid(alpha=0.25)
        _few_ticks(axes, [row.parameters for row in mine])
    left.legend(fontsize=8, frameon=False)
    return figure


def _few_ticks(axes: Axes, parameters: Sequence[int]) -> None:
    """Plain numbers on a logarithmic axis that spans less than a few decades."""
    low, high = min(parameters), max(parameters)
    ticks = [value * 10**power for power in range(3, 12) for value in (1, 1.5, 2, 3, 5, 7)]
    inside = [tick for tick in ticks if low * 0.9 <= tick <= high * 1.1]
    axes.set_xticks(inside, [f"{tick / 1e6:g}M" if tick >= 1e6 else f"{tick / 1e3:g}K" for tick in inside])
    axes.minorticks_off()


def _color(grid: Grid, scheme: str, schemes: Sequence[str]) -> str:
    """The reference is black, the others take the palette in order."""
    others = [name for name in schemes if name != grid.reference]
    return "black" if scheme == grid.reference else f"C{others.index(scheme) % 10}"


def _save(figure: Figure, stem: Path, kind: str) -> Path:
    figure.tight_layout()
    path = stem.with_name(f"{stem.name}_{kind}.png")
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    temporary.replace(path)
    return path
