"""Draw training and validation loss of one run, or of several side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from mesh_megatron.config.cli import parse, run
from mesh_megatron.util.atomic_files import prepare_file


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw training and validation losses from metrics.jsonl files."""

    metrics: tyro.conf.Positional[tuple[Path, ...]]
    """One metrics.jsonl per run, or the folder that the run's --save named. The figure names a run after its folder, or
    by its full path if two folders have the same name."""
    output: Path = Path("loss.png")
    """Figure to write; the suffix chooses the format (.png, .svg, .pdf)."""


def main() -> int:
    args = parse(Arguments, description=__doc__)
    return run(lambda: plot(args))


def plot(args: Arguments) -> None:
    """Draw the figure; raise ``ValueError`` if two files are in the same folder, as both would have the same name."""
    from mesh_megatron.analysis.curves import plot_losses
    from mesh_megatron.analysis.labels import names_of
    from mesh_megatron.analysis.scaling_figure import check_format
    from mesh_megatron.checkpoint.metrics_file import METRICS_FILE

    if not args.metrics:
        raise ValueError(f"no runs: give one {METRICS_FILE} per run")
    prepare_file(args.output, "--output")
    check_format(args.output, "--output")
    files = [path / METRICS_FILE if path.is_dir() else path for path in args.metrics]
    runs = dict(zip(names_of([path.parent for path in files]), files, strict=True))
    if len(runs) < len(files):
        raise ValueError(f"{' '.join(map(str, args.metrics))}: two files are in the same folder; give one file per run")
    plot_losses(runs, args.output)
    print(f"wrote {args.output}")
