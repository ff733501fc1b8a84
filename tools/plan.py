"""What a run will hold, send and compute on a rank, and the layout that does it fastest. See docs/scaling.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from rich.console import Console
from rich.table import Table

from mesh_megatron.config import cli
from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.planning.assumptions import Assumptions
from mesh_megatron.planning.command import command_line
from mesh_megatron.planning.duration import Duration, duration
from mesh_megatron.planning.gpus import gpu_named
from mesh_megatron.planning.links import Links
from mesh_megatron.planning.memory import RankMemory
from mesh_megatron.planning.plan import RECOMPUTE, Plan, plan_run
from mesh_megatron.planning.search import Found, micro_batches, search
from mesh_megatron.planning.step_time import StepModel, StepTime
from mesh_megatron.planning.summary import summary_of

PAPERS_TOKENS = 250_000_000_000
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Arguments(RunConfig):
    """Plan a run of pretrain_mesh.py: takes its flags (--world-size is how many GPUs), and these. Where it is not told
    otherwise it plans for --bf16, --global-batch-size 512 and 250B tokens, as the paper trains. Without a layout of
    ranks it looks for the fastest one that fits and prints the command that starts it."""

    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(bf16=True, global_batch_size=512))

    gpu: str = "h100"
    """Kind of GPU: a100, h100, h200, b200 (mesh_megatron/planning/gpus.yaml)."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins."""
    memory_reserve_gib: float = 6.0
    """Memory left to CUDA, NCCL and fragmentation."""
    search: Literal["auto", "always", "never"] = "auto"
    """Search the sizes of tensor, pipeline and context parallelism, micro-batch and recompute, in place of what flags
    say of them; auto does where there are several GPUs and neither flags nor --config say anything of them."""
    search_tensor_across_nodes: bool = False
    """Let the search spread tensor parallelism over nodes."""
    assumptions: Assumptions = field(default_factory=Assumptions)


def main(args: Sequence[str] | None = None) -> int:
    settings = with_length(cli.parse_run(Arguments, PRESETS, args, prog="plan.py"))
    try:
        settings.assumptions.validate()
        if settings.gpus_per_node < 1:
            raise ValueError(f"--gpus-per-node {settings.gpus_per_node}: must be at least 1")
        links = Links(gpu_named(settings.gpu), settings.assumptions, settings.gpus_per_node)
        if searches(settings):
            report_search(settings, links)
        else:
            report(settings, links)
    except ValueError as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def with_length(settings: Arguments) -> Arguments:
    """Trains for the paper's tokens where no length is given."""
    training = settings.training
    if training.train_iters or training.train_samples or training.train_tokens:
        return settings
    return replace(settings, training=replace(training, train_tokens=PAPERS_TOKENS))


def searches(settings: Arguments) -> bool:
    """Whether a layout is to be looked for."""
    if settings.search != "auto":
        return settings.search == "always"
    untouched = settings.parallel == ParallelConfig() and settings.training.micro_batch_size == 1
    return untouched and (settings.world_size or 1) > 1


def plain(settings: Arguments) -> RunConfig:
    """Without what only this tool knows."""
    return RunConfig(**{f.name: getattr(settings, f.name) for f in fields(RunConfig)})


def report_search(settings: Arguments, links: Links) -> None:
    run, ranks, console = plain(settings), settings.world_size or 1, Console()
    found = search(run, ranks, links, room(settings, links), tensor_across_nodes=settings.search_tensor_across_nodes)
    console.print(found_table(found, ranks, links), "Predicted, not measured; docs/scaling.md says from what.")
    files = [
        word for name in ("config", "preset") if (value := getattr(run, name)) for word in (f"--{name}", f"{value}")
    ]
    base = cli.parse_run(RunConfig, PRESETS, files)
    print(f"\n{command_line(found[0].run, base, ranks, settings.gpus_per_node)}")


def report(settings: Arguments, links: Links) -> None:
    run, ranks, console = plain(settings), settings.world_size or 1, Console()
    plan = plan_run(run, ranks, settings.gpus_per_node)
    rows = plan.summary.vocabulary_rows
    time = StepModel(run, rows, ranks, micro_batches(run, ranks), links).simulated()
    console.print(plan.summary.to_text(), highlight=False)
    if plan.active_parameters != plan.summary.parameters.total:
        console.print(f"active parameters a token: {plan.active_parameters:,}", highlight=False)
    console.print(memory_table(plan), recompute_table(plan), traffic_table(plan), time_table(time))
    whole = duration(plan.summary, links.gpu, time.total)
    console.print(
        f"predicted: {time.total:.3g} s a step, {whole.tokens_a_second:,.0f} tokens/s, {whole.mfu:.1%} of the GPUs' "
        f"bfloat16 peak, {whole.days:.1f} days, {whole.gpu_hours:,.0f} GPU-hours; bubble of the ring {time.bubble:.2%}",
        highlight=False,
    )
    space, needed = room(settings, links) / GIB, plan.fullest.total / GIB
    verdict = "fits" if needed <= space else "DOES NOT FIT"
    console.print(
        f"{verdict}: {needed:.1f} GiB of {space:.1f} ({links.gpu.name} less --memory-reserve-gib)", highlight=False
    )


def room(settings: Arguments, links: Links) -> float:
    """Bytes that a rank may take."""
    return links.gpu.memory_gb * 1e9 - settings.memory_reserve_gib * GIB


def found_table(found: list[Found], ranks: int, links: Links) -> Table:
    columns = ("PP", "CP", "DP", "micro-batch", "recompute", "s a step", "tokens/s", "MFU", "bubble", "days", "GiB")
    table = _table(f"The fastest layouts that fit {ranks} x {links.gpu.name}", "TP", *columns)
    for one in found:
        whole, parallel = predicted(one, ranks, links), one.run.parallel
        table.add_row(
            str(parallel.tensor_model_parallel_size), str(parallel.pipeline_model_parallel_size),
            str(parallel.context_parallel_size), str(parallel.data_parallel_size(ranks)),
            str(one.run.training.micro_batch_size), parallel.recompute_granularity or "none", f"{one.time.total:.3g}",
            f"{whole.tokens_a_second:,.0f}", f"{whole.mfu:.1%}", f"{one.time.bubble:.1%}", f"{whole.days:.2f}",
            f"{one.fullest.total / GIB:.1f}",
        )  # fmt: skip
    return table


def predicted(found: Found, ranks: int, links: Links) -> Duration:
    summary = summary_of(found.run, found.run.model.padded_vocabulary(None), ranks)
    return duration(summary, links.gpu, found.time.total)


def time_table(time: StepTime) -> Table:
    table = _table("Where the busiest rank's time of a step goes, predicted", "for", "ms", "share")
    waiting = time.ring - time.busiest.total
    rows = {
        **{kind: getattr(time.busiest, kind) for kind in TIMES},
        "waiting for the ring": waiting,
        "gradients, not hidden": time.gradients,
        "optimizer": time.optimizer,
        "weights, not hidden": time.weights,
    }
    for name, seconds in rows.items():
        table.add_row(TIMES.get(name, name), f"{seconds * 1e3:,.2f}", f"{seconds / time.total:.1%}")
    return table


def memory_table(plan: Plan) -> Table:
    table = _table("Memory of a rank at its fullest moment, GiB", "place on the ring", *KINDS, "total", "in flight")
    for place, rank in enumerate(plan.memory):
        table.add_row(str(place), *_gib(rank), str(rank.in_flight))
    return table


def recompute_table(plan: Plan) -> Table:
    table = _table("The fullest rank by --recompute-granularity, GiB", "recompute", *KINDS, "total")
    for choice in RECOMPUTE:
        table.add_row(choice or "none", *_gib(plan.fullest_with(choice)))
    return table


def traffic_table(plan: Plan) -> Table:
    table = _table("What the busiest rank sends in a step", "for", "link", "messages", "GB", "MB a message")
    for row in plan.traffic:
        table.add_row(
            row.reason, row.link, f"{row.messages:,}", f"{row.bytes_sent / 1e9:.3f}",
            f"{row.bytes_sent / row.messages / 1e6:.2f}",
        )  # fmt: skip
    return table


TIMES = {
    "products": "matrix products",
    "attention": "attention",
    "memory": "memory-bound operations",
    "messages": "messages inside layers",
    "launches": "starting kernels",
}
KINDS = ("weights", "gradients", "optimizer", "activations", "history", "working")


def _gib(rank: RankMemory) -> list[str]:
    return [f"{getattr(rank, kind) / GIB:.2f}" for kind in (*KINDS, "total")]


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


if __name__ == "__main__":
    sys.exit(main())
