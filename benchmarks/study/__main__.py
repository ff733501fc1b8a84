"""Train every recurrence scheme at matched compute and compare them: python -m benchmarks.study tiny."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.study.grid import Grid, read_grid
from mesh_megatron.config.cli import parse


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train the cells of a grid (setups x schemes x seeds), then write the table and the figures.

    The same command goes on where it stopped.
    """

    grid: tyro.conf.Positional[str]
    """tiny, small, gpu, or a YAML file of your own."""
    output: Path | None = None
    """Folder of cells, table and figures; default study/GRID."""
    workers: int | None = None
    """Cells trained at the same time; default one for each GPU, without GPUs one for each core."""
    report_only: bool = False
    """Train nothing: table and figures from the cells that are done."""
    dry_run: bool = False
    """Print what will be trained with its parameters and FLOPs, and stop."""
    gpu: str | None = None
    """With --dry-run: also predict the time on one such GPU (a100, h100, h200, b200)."""


def main() -> int:
    args = parse(Arguments, prog="python -m benchmarks.study")
    output = args.output or Path("study") / Path(args.grid).stem
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop is an interrupt like Ctrl-C
    try:
        grid = read_grid(args.grid)
        if args.dry_run:
            from benchmarks.study.plan import describe

            print(describe(grid, args.gpu))
            return 0
        return study(grid, output.resolve(), args.workers, args.report_only)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"benchmarks.study: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.study: stopped; the same command goes on", file=sys.stderr)
        return 130


def study(grid: Grid, output: Path, workers: int | None, report_only: bool) -> int:
    """Train what is not done, report on what is; the exit code says whether a cell failed."""
    from benchmarks.study import corpus, report, run
    from benchmarks.study.compare import admitted, read_results

    failed = []
    if not report_only:
        import torch

        output.mkdir(parents=True, exist_ok=True)
        tokens = corpus.prepare(grid.corpus, output / "data")
        trainer = run.Trainer(output, tokens, run.places(workers, torch.cuda.device_count()))
        for stage in grid.stages:
            failed += trainer.train(admitted(grid, stage, read_results(grid, output)))
    report.write(grid, output)
    for cell in failed:
        print(f"FAILED {cell.name}: see {output / cell.name / 'log.txt'}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
