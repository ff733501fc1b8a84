"""Evaluate a checkpoint or an exported model: perplexity and LM Evaluation Harness. See docs/huggingface.md."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mesh_megatron.config.bounds import Bounds, Count
from mesh_megatron.util.atomic_files import prepare_file, write_atomically

if TYPE_CHECKING:
    from mesh_megatron.hf.loading import LoadedModel


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate a checkpoint or an exported model: perplexity over data, and tasks of the LM Evaluation Harness."""

    load: Path
    """An exported model, or the folder that a run's --save named, or one checkpoint in it."""
    iteration: Annotated[int, Bounds(least=0)] | None = None
    """Checkpoint to evaluate; default the newest."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision to compute in; default the stored one."""
    tokenizer_model: Path | None = None
    """Where the tokenizer's model is now, if it has moved since training."""
    output: Path | None = None
    """Also write the results to this JSON file."""

    data_path: tuple[str, ...] = ()
    """Prefixes of .bin/.idx pairs, or text files; each is one stream of tokens."""
    seq_length: Count | None = None
    """Tokens per window; default the model's longest sequence."""
    stride: Count | None = None
    """Tokens from one window to the next; default --seq-length, as in training. A smaller stride gives more context."""
    batch_size: Count = 8
    """Number of windows, or requests of a task, per batch."""

    tasks: tuple[str, ...] = ()
    """Tasks of the LM Evaluation Harness."""
    num_fewshot: Annotated[int, Bounds(least=0)] | None = None
    """Number of few-shot examples; default the task's own number."""
    include_path: Path | None = None
    """Folder with additional task definitions."""
    limit: Count | None = None
    """Evaluate only this many documents per task."""

    loops: tuple[Count, ...] = ()
    """Evaluate with the shared core run so often; several numbers give a curve. Default: as in training."""
    figure: Path | None = None
    """Draw the loss of each --data-path over --loops (.png, .svg, .pdf)."""


def main() -> int:
    from mesh_megatron.config.cli import parse, run

    args = parse(Evaluate)
    return run(lambda: report(args))


def report(args: Evaluate) -> None:
    """Print the results, and write them to --output if given."""
    text = json.dumps(without_overflow(evaluate(args)), indent=1)
    print(text)
    if args.output is not None:
        write_atomically(args.output, text + "\n")


def without_overflow(numbers: Any) -> Any:
    """Replace infinite numbers and NaN, which JSON cannot hold, with None."""
    if isinstance(numbers, dict):
        return {name: without_overflow(value) for name, value in numbers.items()}
    return None if isinstance(numbers, float) and not math.isfinite(numbers) else numbers


def evaluate(args: Evaluate) -> dict[str, dict]:
    """Return the numbers of each data path and task by its name; with --loops, by its name and number of loops.

    Raises ``ValueError`` if there is nothing to evaluate, or for a model that cannot run so often.
    """
    if not args.data_path and not args.tasks:
        raise ValueError("nothing to evaluate: give --data-path or --tasks")
    if args.output is not None:
        prepare_file(args.output, "--output")
    _check_figure(args)
    import torch

    from mesh_megatron.data.tokenizers import from_config
    from mesh_megatron.hf.loading import load_model
    from mesh_megatron.hf.token_streams import read_stream
    from mesh_megatron.platform import device

    streams = {path: read_stream(path) for path in args.data_path}
    dtype = getattr(torch, args.dtype) if args.dtype else None
    loaded = load_model(args.load, args.iteration, dtype, device.device(), from_config, args.tokenizer_model)
    if not args.loops:
        return _numbers(args, loaded, streams)
    results: dict[str, dict] = {name: {} for name in (*args.data_path, *args.tasks)}
    for loops in args.loops:
        loaded.set_loops(loops)
        for name, numbers in _numbers(args, loaded, streams).items():
            results.setdefault(name, {})[str(loops)] = numbers
    if args.figure is not None:
        from mesh_megatron.analysis.loops_figure import draw_loss_over_loops

        curves = {path: [results[path][str(loops)]["loss"] for loops in args.loops] for path in args.data_path}
        draw_loss_over_loops(args.loops, curves, loaded.trained_loops, args.figure)
    return results


def _check_figure(args: Evaluate) -> None:
    """Raise ``ValueError`` for a figure that could not be drawn, before the evaluation."""
    if args.figure is None:
        return
    if not args.loops or not args.data_path:
        raise ValueError(f"--figure {args.figure}: draws the loss of --data-path over --loops: give both")
    from mesh_megatron.analysis.scaling_figure import check_format

    check_format(args.figure, "--figure")
    prepare_file(args.figure, "--figure")


def _numbers(args: Evaluate, loaded: LoadedModel, streams: Mapping[str, Any]) -> dict[str, dict]:
    from mesh_megatron.hf.evaluation import data_perplexity, run_tasks

    window = args.seq_length or loaded.max_length
    if window > loaded.max_length:
        logger.warning(
            f"--seq-length {window}: the model's longest sequence is {loaded.max_length}; later positions "
            "may be predicted badly"
        )
    results = {
        path: data_perplexity(loaded, path, stream, window, args.stride or window, args.batch_size).to_dict()
        for path, stream in streams.items()
    }
    if args.tasks:
        results |= run_tasks(loaded, args.tasks, args.batch_size, args.num_fewshot, args.include_path, args.limit)
    return results
