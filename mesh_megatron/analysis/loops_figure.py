"""The figure of loss over the number of loops at inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window on any machine
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter  # noqa: E402

from mesh_megatron.util.atomic_files import replace_when_complete  # noqa: E402


def draw_loss_over_loops(
    loops: Sequence[int], curves: Mapping[str, Sequence[float]], trained: int | None, output: Path
) -> None:
    """Draw ``curves`` (name -> loss per token at each of ``loops``) to ``output``, and a line at ``trained`` loops."""
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for name, losses in curves.items():
        points = sorted(zip(loops, losses, strict=True))
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=Path(name).name)
    if trained is not None:
        axes.axvline(trained, color="0.6", linestyle="--", linewidth=1, zorder=1, label="as trained")
    axes.set(xscale="log", xlabel="loops K", ylabel="loss, nats per token")
    axes.xaxis.set(
        major_locator=FixedLocator(sorted(set(loops))),
        minor_locator=NullLocator(),
        major_formatter=ScalarFormatter(),
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    with replace_when_complete(output) as temporary:
        figure.savefig(temporary, dpi=160)
    plt.close(figure)
