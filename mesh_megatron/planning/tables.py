"""Tables of a plan for a terminal of 80 columns."""

from __future__ import annotations

from rich import box
from rich.table import Table

from mesh_megatron.planning.plan import RECOMPUTE, Plan
from mesh_megatron.planning.rank_memory import RankMemory
from mesh_megatron.planning.search import Found
from mesh_megatron.planning.step_time import StepTime

GIB = 2**30
KINDS = ("weights", "gradients", "optimizer", "activations", "history", "working")


def found_table(found: list[Found], title: str) -> Table:
    """Return a table with one row per layout, in the order given."""
    columns = (
        "TP",
        "PP",
        "CP",
        "DP",
        "micro-\nbatch",
        "recompute",
        "s per\nstep",
        "tokens\nper s",
        "MFU",
        "bubble",
        "days",
    )
    table = _table(title, "GPUs", *columns, "GiB")
    for one in found:
        whole, parallel = one.duration, one.run.parallel
        table.add_row(
            str(one.world_size), str(parallel.tensor_model_parallel_size), str(parallel.pipeline_model_parallel_size),
            str(parallel.context_parallel_size), str(parallel.data_parallel_size(one.world_size)),
            str(one.run.training.micro_batch_size), parallel.recompute_granularity or "none", rounded(one.time.total),
            f"{whole.tokens_a_second:,.0f}", f"{whole.mfu:.1%}", f"{one.time.bubble:.1%}", f"{whole.days:,.2f}",
            f"{one.fullest.total / GIB:.1f}",
        )  # fmt: skip
    return table


def time_table(time: StepTime) -> Table:
    table = _table("Predicted step time of the busiest rank", "for", "ms", "share")
    for reason, seconds in time.by_reason().items():
        table.add_row(reason, f"{seconds * 1e3:,.2f}", f"{seconds / time.total:.1%}")
    return table


def memory_table(plan: Plan) -> Table:
    table = _table("Peak memory of a rank by its place on the ring, GiB", "place", *KINDS, "total", "in\nflight")
    for place, rank in enumerate(plan.memory):
        table.add_row(str(place), *_gib(rank), str(rank.in_flight))
    return table


def recompute_table(plan: Plan) -> Table:
    table = _table("Memory of the fullest rank by --recompute-granularity, GiB", "recompute", *KINDS, "total")
    for choice in RECOMPUTE:
        table.add_row(choice or "none", *_gib(plan.fullest_with(choice)))
    return table


def traffic_table(plan: Plan) -> Table:
    table = _table("Messages that the busiest rank sends per step", "for", "link", "messages", "GB", "MB each")
    for row in plan.traffic:
        table.add_row(
            row.reason, row.link, f"{row.messages:,}", f"{row.bytes_sent / 1e9:.3f}",
            f"{row.bytes_sent / row.messages / 1e6:.2f}",
        )  # fmt: skip
    return table


def rounded(number: float) -> str:
    """Return ``number`` with three digits, or more before the point, never with an exponent for large ones."""
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"


def _gib(rank: RankMemory) -> list[str]:
    return [f"{getattr(rank, kind) / GIB:.2f}" for kind in (*KINDS, "total")]


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table
