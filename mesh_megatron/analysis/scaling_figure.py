"""The figure of predicted scaling: throughput, utilisation of the GPUs, and the shares of a step's time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window on any machine
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402

from mesh_megatron.util.atomic_files import replace_when_complete  # noqa: E402

Points = Sequence[Mapping[str, Any]]
"""Results of ``planning.scaling.numbers``, in ascending number of GPUs."""
_STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
_SHARES = {
    "computing": ("#d0d0d0", ("matrix products", "attention", "memory-bound operations", "optimizer")),
    "starting kernels": ("#909090", ("starting kernels",)),
    "messages inside layers": ("#8c6bb1", ("messages inside layers",)),
    "waiting for the ring": ("#e7298a", ("waiting for the ring",)),
    "gradients and weights": ("#1b7fa6", ("gradients, not hidden", "weights, not hidden")),
}


def check_format(output: Path, flag: str) -> None:
    """Raise ``ValueError`` for a suffix that matplotlib cannot write, before the planning starts."""
    if output.suffix[1:].lower() not in FigureCanvasAgg.get_supported_filetypes():
        raise ValueError(f"{flag} {output}: not a figure format; use .png, .svg or .pdf")


def draw_scaling(curves: Mapping[str, Points], output: Path) -> None:
    """Draw ``curves`` (name -> points) to ``output`` (.png, .svg, ...); the bars show the first curve."""
    with plt.rc_context(_STYLE):
        figure, (speed, use, shares) = plt.subplots(
            1, 3, figsize=(13, 3.4), width_ratios=(1, 1, 2.1), layout="constrained"
        )
        for (name, points), marker in zip(curves.items(), cycle("os^Dv"), strict=False):
            gpus = [point["gpus"] for point in points]
            speed.plot(gpus, [point["tokens_a_second"] for point in points], marker=marker, markersize=4, label=name)
            use.plot(gpus, [100 * point["mfu"] for point in points], marker=marker, markersize=4, label=name)
        _ideal(speed, list(curves.values()))
        speed.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens per second")
        speed.legend(handles=speed.get_lines()[-1:], frameon=False, fontsize=8)
        use.set(xscale="log", xlabel="GPUs", ylabel="model FLOPs, % of the GPUs' peak", ylim=(0, None))
        use.legend(title="global batch", loc="lower left", frameon=False, fontsize=8, title_fontsize=8)
        for axes in (speed, use):
            axes.grid(alpha=0.3)
        name, points = next(iter(curves.items()))
        _stack(shares, points)
        shares.set_title(f"{name}; above the bars TP·PP·CP of the fastest layout", fontsize=9)
        with replace_when_complete(output) as temporary:
            figure.savefig(temporary, dpi=160)
        plt.close(figure)


def _ideal(axes: Axes, curves: Sequence[Points]) -> None:
    """Draw linear scaling from the best throughput per GPU of the smallest number of GPUs."""
    first = min(points[0]["gpus"] for points in curves)
    last = max(points[-1]["gpus"] for points in curves)
    rate = max(points[0]["tokens_a_second"] / first for points in curves if points[0]["gpus"] == first)
    axes.plot(
        [first, last], [rate * first, rate * last], color="0.6", linestyle="--", linewidth=1, zorder=1, label="linear"
    )


def _stack(axes: Axes, points: Points) -> None:
    """Draw the shares of a step's time, one bar per number of GPUs."""
    places = range(len(points))
    below = [0.0] * len(points)
    for name, (color, reasons) in _SHARES.items():
        parts = [100 * sum(point["by_reason"][reason] for reason in reasons) / point["step"] for point in points]
        axes.bar(places, parts, bottom=below, width=0.75, label=name, color=color)
        below = [one + other for one, other in zip(below, parts, strict=True)]
    for place, point in zip(places, points, strict=True):
        axes.text(place, 101, f"{point['tensor']}·{point['pipeline']}·{point['context']}", ha="center", fontsize=8)
    axes.set_xticks(list(places), [f"{point['gpus']:,}" for point in points], rotation=30)
    axes.set(xlabel="GPUs", ylabel="% of a step", ylim=(0, 106))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
