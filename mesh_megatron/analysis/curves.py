"""Draw training and validation losses of runs as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window on any machine
import matplotlib.pyplot as plt  # noqa: E402

from mesh_megatron.checkpoint.metrics_file import read_metrics  # noqa: E402
from mesh_megatron.util.atomic_files import replace_when_complete  # noqa: E402

Curve = tuple[list[float], list[float]]
_LINES = ("-", "--", ":", "-.")
_SERIES = {"lm loss": "training", "lm loss validation": "validation", "lm loss test": "test"}


def read_curves(metrics: Path, last: int | None = None) -> dict[str, Curve]:
    """Read every loss in a run's metrics.jsonl, up to iteration ``last``: tag -> (iterations, losses)."""
    curves: dict[str, Curve] = {}
    for record in read_metrics(metrics):
        if last is not None and record.get("iteration", last + 1) > last:
            continue
        for tag, value in record.items():
            if tag.startswith("lm loss"):
                steps, losses = curves.setdefault(tag, ([], []))
                steps.append(record["iteration"])
                losses.append(value)
    return curves


def plot_losses(runs: Mapping[str, Path], output: Path, last: int | None = None) -> None:
    """Draw loss over iterations, up to ``last``, of one or more runs (name -> metrics.jsonl) to ``output`` (.png, ...).

    Raises ``ValueError`` if a run has no losses.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for number, (run, metrics) in enumerate(runs.items()):
        curves = read_curves(metrics, last)
        if not curves:
            raise ValueError(f"{metrics} has no losses")
        evaluations = [tag for tag in curves if tag != "lm loss"]
        for tag, (steps, losses) in curves.items():
            training = tag == "lm loss"
            style: dict[str, Any] = {"linewidth": 1.0, "alpha": 0.5}
            if not training:  # one colour per run, one kind of line per validation set
                line = _LINES[evaluations.index(tag) % len(_LINES)]
                style = {"linewidth": 1.8, "marker": "o", "markersize": 4, "linestyle": line}
            name = _SERIES.get(tag, tag.removeprefix("lm loss "))
            label = name if len(runs) == 1 else f"{run}, {name}"
            axes.plot(steps, losses, color=f"C{2 * number + (not training)}", label=label, **style)
    axes.set(xlabel="iteration", ylabel="cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with replace_when_complete(output) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)
