"""What a run will hold, send and compute on a rank, before a GPU is asked for. See docs/scaling.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table

from mesh_megatron.config import cli
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.planning.duration import duration
from mesh_megatron.planning.gpus import Gpu, gpu_named
from mesh_megatron.planning.memory import RankMemory
from mesh_megatron.planning.plan import RECOMPUTE, Plan, plan_run

PAPERS_TOKENS = 250_000_000_000
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Arguments(RunConfig):
    """Plan a run of pretrain_mesh.py: takes its flags (--world-size is how many GPUs), and these. Where it is not told
    otherwise it plans for --bf16, --global-batch-size 512 and 250B tokens, as the paper trains."""

    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(bf16=True, global_batch_size=512))

    gpu: str = "h100"
    """Kind of GPU: a100, h100, h200, b200 (mesh_megatron/planning/gpus.yaml)."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins."""
    memory_reserve_gib: float = 6.0
    """Memory left to CUDA, NCCL and fragmentation."""
    efficiency: float = 0.4
    """Assumed share of the peak (bf16, or fp32 without --bf16) that a busy GPU reaches."""


def main(args: Sequence[str] | None = None) -> int:
    settings = with_length(cli.parse_run(Arguments, PRESETS, args, prog="plan.py"))
    try:
        gpu = gpu_named(settings.gpu)
        report(plan_run(settings, settings.world_size or 1, settings.gpus_per_node), settings, gpu)
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


def report(plan: Plan, settings: Arguments, gpu: Gpu) -> None:
    console = Console()
    console.print(plan.summary.to_text(), highlight=False)
    if plan.active_parameters != plan.summary.parameters.total:
        console.print(f"active parameters a token: {plan.active_parameters:,}", highlight=False)
    console.print(memory_table(plan), recompute_table(plan), traffic_table(plan))
    console.print(f"bubble of the ring: {plan.bubble:.2%} of the ranks' time, messages taking none", highlight=False)
    time = duration(plan, gpu, settings.efficiency)
    console.print(
        f"at {settings.efficiency:.0%} of the peak, messages hidden: {time.seconds_a_step:.2f} s a step, "
        f"{time.tokens_a_second:,.0f} tokens/s, {time.days:.1f} days, {time.gpu_hours:,.0f} GPU-hours",
        highlight=False,
    )
    room = gpu.memory_gb * 1e9 / GIB - settings.memory_reserve_gib
    needed = plan.fullest.total / GIB
    verdict = "fits" if needed <= room else "DOES NOT FIT"
    console.print(f"{verdict}: {needed:.1f} GiB of {room:.1f} ({gpu.name} less --memory-reserve-gib)", highlight=False)


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
