"""Prediction of a grid's cost before it is started."""

from __future__ import annotations

import datetime

from benchmarks.study.grid import Grid
from mesh_megatron.planning.hardware import Assumptions, Links, gpu_named
from mesh_megatron.planning.step_time import StepModel
from mesh_megatron.planning.summary import RunSummary, summary_of


def describe(grid: Grid, gpu: str | None = None) -> str:
    """A line for each scheme of each setup and the sums; with ``gpu`` also the planner's time on one such GPU."""
    links = Links(gpu_named(gpu), Assumptions(), gpus_per_node=1) if gpu else None
    lines: dict[tuple[str, str], str] = {}
    flops, seconds = 0, 0.0
    for cell in grid.cells:
        run = cell.run()
        summary = summary_of(run, run.model.padded_vocabulary(grid.corpus.vocabulary), 1)
        flops += summary.total_flops
        line = f"{cell.setup:<10} {cell.scheme:<20} {_facts(summary)}"
        if links is not None:
            step = StepModel(run, summary.vocabulary_rows, 1, summary.micro_batches, links).simulated().total
            seconds += step * cell.iterations
            line += f"  {summary.total_flops / (step * cell.iterations) / 1e12:6.1f} TFLOP/s"
        lines.setdefault((cell.setup, cell.scheme), line)
    total = f"{len(grid.cells)} cells, {flops:.3g} FLOPs"
    if links is not None:
        time = datetime.timedelta(seconds=round(seconds))
        total += (
            f"; steps take {time} on one {links.gpu.name}, {flops / seconds / links.gpu.bf16_tflops / 1e12:.0%} of its "
            "bfloat16 peak, predicted as tools/plan.py does; starting processes and evaluating come on top"
        )
    return "\n".join([*lines.values(), total])


def _facts(summary: RunSummary) -> str:
    layers = f"{summary.unique_layers} layers, {summary.computed_layers} computed"
    return (
        f"{summary.parameters.total:>12,} parameters  {layers}  {summary.total_tokens:,} tokens  "
        f"{summary.total_flops:.3g} FLOPs"
    )
