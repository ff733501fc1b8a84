"""Plan a run: memory, traffic and time per rank, and the fastest layout of ranks. See docs/scaling.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console

from mesh_megatron.config import cli
from mesh_megatron.config.bounds import Bounds, Count, check_bounds
from mesh_megatron.config.checkpoint import CheckpointConfig
from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.config.without_effect import settings_without_effect
from mesh_megatron.planning.command import command_line, launcher, of_files_and_presets
from mesh_megatron.planning.duration import duration
from mesh_megatron.planning.hardware import Assumptions, Links, gpu_named
from mesh_megatron.planning.mean_step import MeanStep
from mesh_megatron.planning.plan import plan_run
from mesh_megatron.planning.scaling import Batch, doublings, numbers, scale
from mesh_megatron.planning.search import Found, micro_batches, search
from mesh_megatron.planning.tables import (
    GIB,
    found_table,
    memory_table,
    recompute_table,
    rounded,
    time_table,
    traffic_table,
)
from mesh_megatron.util.atomic_files import prepare_file, write_atomically

PAPERS_TOKENS = 250_000_000_000
PAPERS_BATCH = 512
"""Sequences in a global batch."""
LAYOUT_OF_RANKS = (
    *("tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size", "context_parallel_size"),
    *("recompute_granularity", "use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"),
    *("use_torch_fsdp2", "num_distributed_optimizer_instances"),
)
"""Settings of ``ParallelConfig`` that a search chooses, or that it does not look at; it keeps all others."""


@dataclass(frozen=True, kw_only=True)
class Arguments(RunConfig):
    """Plan a run of pretrain_mesh.py: takes its flags (--world-size is the number of GPUs) and those below. The
    defaults are --bf16 (unless --fp16 is given), --global-batch-size 512 and 250B tokens, as in the paper. If no
    layout of ranks is given, it searches for the fastest one that fits, plans it and prints the command to start it."""

    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(bf16=True))

    gpu: str = "h100"
    """Kind of GPU: a100, h100, h200, b200 (mesh_megatron/planning/gpus.yaml)."""
    gpus_per_node: Count = 8
    """GPUs connected by NVLink."""
    memory_reserve_gib: Annotated[float, Bounds(least=0)] = 6.0
    """Memory in GiB reserved for CUDA, NCCL and fragmentation."""
    search: Literal["auto", "always", "never"] = "auto"
    """Search for tensor, pipeline and context parallel sizes, micro-batch size and recomputation, ignoring their flags;
    auto does so if there are several GPUs and neither flags nor --config set any of them, nor what replicas share."""
    search_tensor_across_nodes: bool = False
    """Allow the search to spread tensor parallelism over nodes."""
    scaling_figure: Path | None = None
    """Draw only how the fastest layout scales from one node to --world-size GPUs, for --global-batch-size and both
    flags below, and write the numbers to a .json file beside the figure."""
    scaling_batch_sizes: tuple[Count, ...] = (4096,)
    """Further global batches of that figure, in sequences."""
    scaling_sequences_per_gpu: tuple[Count, ...] = (8,)
    """Global batches of that figure that grow with the GPUs, in sequences for each."""
    assumptions: Assumptions = field(default_factory=Assumptions)


def main(args: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if args is None else args
    settings = with_papers_defaults(cli.parse_run(Arguments, PRESETS, words))
    if settings.training.fp16 and "--bf16" not in words:
        settings = replace(settings, training=replace(settings.training, bf16=False))
    return cli.run(lambda: plan(settings))


def plan(settings: Arguments) -> None:
    """Check the settings and print the plan, the search or the scaling figure that they ask for."""
    for part in (settings, settings.assumptions, settings.model):
        check_bounds(part)
    settings = with_vocabulary(settings)
    if settings.summary_json is not None:
        prepare_file(settings.summary_json, "--summary-json")
    links = Links(gpu_named(settings.gpu), settings.assumptions, settings.gpus_per_node)
    if settings.scaling_figure is not None:
        report_scaling(settings, links, settings.scaling_figure)
    elif searches(settings):
        report_search(settings, links)
    else:
        report(plain(settings), settings, links)


def with_papers_defaults(settings: Arguments) -> Arguments:
    """Return settings with the paper's batch and number of tokens where nothing gives them."""
    training = settings.training
    if training.global_batch_size is None and not training.step_batch_size_schedule:
        training = replace(training, global_batch_size=PAPERS_BATCH)
    if not training.has_length:
        training = replace(training, train_tokens=PAPERS_TOKENS)
    return replace(settings, training=training)


def with_vocabulary(settings: Arguments) -> Arguments:
    """Return settings with the number of embedding rows from the tokenizer, unless a flag sets it."""
    if settings.model.padded_vocab_size is not None or settings.data.tokenizer_type is None:
        return settings
    from mesh_megatron.data.tokenizers import from_config  # slow import, rarely needed

    tokenizer = from_config(settings.data)
    rows = settings.model.padded_vocabulary(tokenizer.vocab_size if tokenizer else None)
    return replace(settings, model=replace(settings.model, padded_vocab_size=rows))


def searches(settings: Arguments) -> bool:
    """Return whether to search for a layout."""
    if settings.search != "auto":
        return settings.search == "always"
    free = all(getattr(settings.parallel, name) == getattr(ParallelConfig, name) for name in LAYOUT_OF_RANKS)
    untouched = free and settings.training.micro_batch_size == 1
    return untouched and (settings.world_size or 1) > 1


def plain(settings: Arguments) -> RunConfig:
    """Return the settings without those that only this tool has."""
    return RunConfig(**{f.name: getattr(settings, f.name) for f in fields(RunConfig)})


def report_search(settings: Arguments, links: Links) -> None:
    run, ranks, console = plain(settings), settings.world_size or 1, Console()
    base = cli.parse_run(RunConfig, PRESETS, of_files_and_presets(run))
    launcher(ranks, settings.gpus_per_node)  # what has no command is refused before the search
    found = search(run, ranks, links, room(settings, links), tensor_across_nodes=settings.search_tensor_across_nodes)
    console.print(
        found_table(found, f"The fastest layouts that fit {ranks} x {links.gpu.name}"), "\nThe first of them:\n"
    )
    report(found[0].run, settings, links)
    print(f"\n{command_line(found[0].run, base, ranks, settings.gpus_per_node)}")


def report(run: RunConfig, settings: Arguments, links: Links) -> None:
    ranks, console = settings.world_size or 1, Console()
    planned = plan_run(run, ranks, settings.gpus_per_node)
    for line in settings_without_effect(replace(run, checkpoint=CheckpointConfig())):
        console.print(f"warning: {line}", highlight=False, soft_wrap=True)
    rows = planned.summary.vocabulary_rows
    time = MeanStep(run, rows, ranks, micro_batches(run, ranks), links).simulated()
    console.print(planned.summary.to_text(), highlight=False, soft_wrap=True)
    if planned.active_parameters != planned.summary.parameters.total:
        console.print(f"active parameters per token: {planned.active_parameters:,}", highlight=False)
    for table in (memory_table(planned), recompute_table(planned), traffic_table(planned), time_table(time)):
        console.print("", table, highlight=False)
    length = duration(planned.summary, links.gpu, time.total)
    space, needed = room(settings, links) / GIB, planned.fullest.total / GIB
    verdict = "fits" if needed <= space else "DOES NOT FIT"
    print(
        f"\n{verdict}: {needed:.1f} GiB of {space:.1f} ({links.gpu.name} less --memory-reserve-gib)\n"
        f"predicted, not measured: {rounded(time.total)} s per step, bubble of the ring {time.bubble:.2%}, "
        f"{length.tokens_a_second:,.0f} tokens/s, {length.mfu:.1%} of the GPUs' bfloat16 peak\n"
        f"{planned.summary.total_tokens:,} tokens: {rounded(length.days)} days, {length.gpu_hours:,.0f} GPU-hours"
    )
    if run.summary_json is not None:
        write_atomically(run.summary_json, json.dumps(planned.summary.to_dict(), indent=1) + "\n")


def report_scaling(settings: Arguments, links: Links, output: Path) -> None:
    from mesh_megatron.analysis.scaling_figure import check_format, draw_scaling  # imports matplotlib

    if settings.summary_json is not None:
        raise ValueError(
            f"--summary-json {settings.summary_json}: --scaling-figure plans many runs; drop one of the two"
        )
    check_format(output, "--scaling-figure")
    prepare_file(output, "--scaling-figure")
    run, sizes = plain(settings), doublings(settings.gpus_per_node, settings.world_size or 16384)
    batches = [
        Batch(sequences=n) for n in (run.training.global_batch_size or PAPERS_BATCH, *settings.scaling_batch_sizes)
    ]
    batches += [Batch(sequences=n, for_each_gpu=True) for n in settings.scaling_sequences_per_gpu]
    curves: dict[str, list[Found]] = {}
    for batch in batches:
        points = scale(run, batch, sizes, links, room(settings, links), print, settings.search_tensor_across_nodes)
        if points:
            curves[batch.name] = points
            Console().print(found_table(points, f"Global batch of {batch.name}"))
    if not curves:
        raise ValueError(f"--world-size {sizes[-1]}: no layout fits, on any number of GPUs up to this")
    record = {name: [numbers(point) for point in points] for name, points in curves.items()}
    draw_scaling(record, output)
    table = output.with_suffix(".json")
    write_atomically(table, json.dumps({"gpu": links.gpu.name, "curves": record}, indent=1) + "\n")
    print(f"wrote {output} and {table}")


def room(settings: Arguments, links: Links) -> float:
    """Return the bytes of GPU memory that a rank may use."""
    return links.gpu.memory_gb * 1e9 - settings.memory_reserve_gib * GIB
