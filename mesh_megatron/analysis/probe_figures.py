"""Figures of probes of one or several models: the paper's Figures 3, 4 and 5, losses per loop, and routers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window on any machine
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

Models = Mapping[str, Mapping[str, Any]]
"""Name of each model -> its numbers, as ``Probe.to_dict`` gives them."""
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mesh_megatron",  # the same numbers give the same file
}


def draw_figures(models: Models, folder: Path) -> None:
    """Write every figure for which ``models`` has numbers, as PNG and SVG, to ``folder``."""
    routed = {name: numbers for name, numbers in models.items() if numbers["routers"] is not None}
    for name, draw in FIGURES.items():
        shown = routed if name.startswith("router") else models
        if not shown:
            continue
        with plt.rc_context(_STYLE):
            figure = draw(shown)
            figure.savefig(folder / f"{name}.png", dpi=150)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


def update_magnitude(models: Models) -> Figure:
    """Figure 3: relative update of the state by each block."""
    figure, panels = _panels(models, sharey=True)
    for axes, numbers in zip(panels, models.values(), strict=True):
        _bars(axes, numbers["blocks"], numbers["update_magnitude"])
    panels[0].set_ylabel("relative update magnitude")
    return figure


def cka(models: Models) -> Figure:
    """Figure 4: similarity of the states, RBF-CKA of every pair."""
    figure, panels = _panels(models, width=3.4, height=3.2)
    for axes, numbers in zip(panels, models.values(), strict=True):
        image = _heat(axes, np.array(numbers["cka"]["mean"]), numbers["states"], numbers["states"])
    figure.colorbar(image, ax=panels, shrink=0.8, label="CKA")
    return figure


def singular_values(models: Models) -> Figure:
    """Figure 5: the largest singular values of every state, each divided by the largest."""
    figure, panels = _panels(models, sharey=True, width=3.4)
    for axes, numbers in zip(panels, models.values(), strict=True):
        states = numbers["states"]
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(states)))
        means, spreads = (np.array(numbers["singular_values"][key]) for key in ("mean", "std"))
        for state, colour, mean, spread in zip(states, colours, means, spreads, strict=True):
            order = np.arange(1, len(mean) + 1)
            axes.plot(order, mean, color=colour, label=state, linewidth=1.2)
            axes.fill_between(order, np.maximum(mean - spread, mean / 10), mean + spread, color=colour, alpha=0.15)
        axes.set(yscale="log", xlabel="singular value")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    panels[0].set_ylabel("divided by the largest")
    return figure


def state_norm(models: Models) -> Figure:
    """The root mean square norm of a token's state."""
    figure, panels = _panels(models, sharey=True)
    for axes, numbers in zip(panels, models.values(), strict=True):
        _bars(axes, numbers["states"], numbers["state_norm"])
    panels[0].set_ylabel("norm of a token's state")
    return figure


def loss(models: Models) -> Figure:
    """Loss of each h(t) put through coda and head: the benefit of every further loop."""
    figure, axes = plt.subplots(figsize=(4.2, 3), layout="constrained")
    for name, numbers in models.items():
        means = numbers["loss"]["mean"]
        axes.plot(range(len(means)), means, marker="o", markersize=4, label=name)
    longest = max(len(numbers["loss"]["mean"]) for numbers in models.values())
    axes.set(xlabel="loops run before coda and head", ylabel="cross-entropy (nats per token)", xticks=range(longest))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def routers(models: Models) -> Figure:
    """Mean write and read weights of every cycle, and the coefficient of each source in the next state."""
    figure, grid = plt.subplots(
        len(models), 3, figsize=(9.5, 2.8 * len(models)), squeeze=False, layout="constrained"
    )  # fmt: skip
    for row, (name, numbers) in zip(grid, models.items(), strict=True):
        found = numbers["routers"]
        cycles, slots = np.shape(found["write"]["mean"])
        after = [f"cycle {cycle}" for cycle in range(cycles)]
        for axes, key in zip(row, ("write", "read"), strict=False):
            _heat(axes, np.array(found[key]["mean"]), after, [str(slot) for slot in range(slots)])
            axes.set(title=f"{name}: {key} weights", xlabel="slot")
        sources = ["h_emb", *(f"y_{cycle}" for cycle in range(cycles))]
        coefficients = np.array(found["coefficients"]["mean"])
        unseen = np.triu(np.ones_like(coefficients, dtype=bool), 2)
        _heat(row[2], np.ma.masked_array(coefficients, unseen), after, sources, top=None)
        row[2].set(title=f"{name}: coefficients", xlabel="source of the next state")
    return figure


def routers_by_position(models: Models) -> Figure:
    """Mean write and read weights of every cycle, by ranges of token positions that double in length."""
    rows = [(name, key) for name in models for key in ("write", "read")]
    columns = max(np.shape(numbers["routers"]["write"]["mean"])[0] for numbers in models.values())
    figure, grid = plt.subplots(
        len(rows), columns, figsize=(2.6 * columns, 2 * len(rows)), squeeze=False, sharex="row", sharey="row",
        layout="constrained",
    )  # fmt: skip
    for line, (name, key) in zip(grid, rows, strict=True):
        found = models[name]["routers"]
        weights = np.array(found[f"{key}_by_position"]["mean"])
        for cycle, axes in enumerate(line):
            if cycle >= weights.shape[1]:
                axes.set_axis_off()
                continue
            for slot in range(weights.shape[2]):
                axes.plot(found["position_starts"], weights[:, cycle, slot], label=f"slot {slot}", linewidth=1.2)
            axes.set_xscale("symlog", base=2, linthresh=1)
            axes.set_title(f"{name}: {key}, cycle {cycle}", fontsize=8)
            axes.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=6)
    for axes in grid[-1]:
        axes.set_xlabel("position from")
    return figure


FIGURES: dict[str, Callable[[Models], Figure]] = {
    draw.__name__: draw
    for draw in (update_magnitude, cka, singular_values, state_norm, loss, routers, routers_by_position)
}


def _panels(
    models: Models, *, sharey: bool = False, width: float = 2.8, height: float = 2.8
) -> tuple[Figure, list[Axes]]:
    """Create one panel per model, titled with its name."""
    figure, grid = plt.subplots(
        1, len(models), figsize=(width * len(models) + 0.6, height), sharey=sharey, squeeze=False, layout="constrained"
    )
    for axes, name in zip(grid[0], models, strict=True):
        axes.set_title(name)
    return figure, list(grid[0])


def _bars(axes: Axes, labels: list[str], moments: Mapping[str, Any]) -> None:
    """Draw means as bars and standard deviations as whiskers."""
    colours = ["C0" if label in ("prelude", "coda", "h_emb", "h_out") else "C1" for label in labels]
    axes.bar(range(len(labels)), moments["mean"], yerr=moments["std"], color=colours, capsize=3)
    axes.set_xticks(range(len(labels)), labels, rotation=45)
    axes.grid(axis="y", alpha=0.3)


def _heat(axes: Axes, values: np.ndarray, rows: list[str], columns: list[str], top: float | None = 1.0) -> Any:
    """Draw a matrix as colours from 0 to ``top`` (None: the largest value), with the numbers in the cells."""
    image: Any = axes.imshow(values, vmin=0, vmax=top, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=45)
    axes.set_yticks(range(len(rows)), rows)
    axes.spines[:].set_visible(False)
    middle = image.norm.vmax / 2
    for (row, column), value in np.ndenumerate(np.ma.filled(values, np.nan)):
        if np.isfinite(value):
            colour = "white" if value < middle else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    return image
