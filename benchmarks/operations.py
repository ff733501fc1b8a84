"""Where the time of a training pass goes, operation by operation: mesh, base and transformers' GPTNeoX.

    python benchmarks/operations.py                                      # small, on a CPU

The models of ``end_to_end.py`` take turns under torch's profiler. The same pass calls the same operations in the same
order every time, so each call's time is the least over all rounds, which neighbours on the machine hardly touch; the
sums are what a pass would take undisturbed. *python* is what autograd functions and modules of Megatron-Core take
themselves, between operations; transformers' modules do not show up there. For a CPU: a GPU's kernels are not counted.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from end_to_end import PLAIN
from end_to_end import Arguments as Sizes
from recurrence import surroundings

KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "GELU": ("gelu", "gelu_backward"),
    "norms": ("native_layer_norm", "native_layer_norm_backward"),
    "loss": ("exp", "exp_", "log", "logsumexp", "amax", "sub", "sub_", "_log_softmax", "_log_softmax_backward_data"),
    "additions": ("add", "add_", "sum", "addcmul", "addcmul_"),
    "copies": ("cat", "copy_"),
    "clearing": ("fill_", "zero_"),
}
"""Kind -> operations of aten; everything else of aten is *the rest*."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Sizes):
    """Least time of every operation of a training pass, by kind."""


def main() -> int:
    from end_to_end import contestants, mesh_model

    from mesh_megatron.config import cli
    from mesh_megatron.config.run import RunConfig
    from mesh_megatron.parallel.groups import start_model_parallel
    from mesh_megatron.platform import device

    args = cli.parse(Arguments, description=__doc__)
    if device.has_gpu():
        print("operations.py: error: counts a CPU's operations; on a GPU use --profile or nsys", file=sys.stderr)
        return 2
    device.start_process_group()
    start_model_parallel(RunConfig())
    passes, _ = contestants(mesh_model(args), args)
    del passes[PLAIN]  # another layer; its attention is not one operation
    record = surroundings() | {"ms": milliseconds(passes, args.rounds)}
    show(record["ms"])
    torch.distributed.destroy_process_group()
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def milliseconds(passes: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Model -> kind -> milliseconds of a pass."""
    least: dict[str, dict[tuple[str, int], float]] = {name: {} for name in passes}
    for run in passes.values():
        run()
    for _ in range(rounds):
        for name, run in passes.items():
            for call, time in calls(run).items():
                least[name][call] = min(time, least[name].get(call, time))
    rows: dict[str, dict[str, float]] = {}
    for name, times in least.items():
        rows[name] = dict.fromkeys([*KINDS, "the rest", "python", "in all"], 0.0)
        for (operation, _), time in times.items():
            rows[name][kind(operation)] += time / 1e3
            rows[name]["in all"] += time / 1e3
    return rows


def calls(run: Callable[[], Any]) -> dict[tuple[str, int], float]:
    """(Operation, how many of it came before) -> microseconds of its own, in one pass."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    seen: dict[str, int] = defaultdict(int)
    times = {}
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        times[event.name, seen[event.name]] = event.self_cpu_time_total
        seen[event.name] += 1
    return times


def kind(operation: str) -> str:
    if not operation.startswith("aten::"):
        return "python"
    return next((name for name, members in KINDS.items() if operation.removeprefix("aten::") in members), "the rest")


def show(rows: dict[str, dict[str, float]]) -> None:
    """Milliseconds and shares, a column for each model."""
    print(f"{'ms of a pass':<18}" + "".join(f"{name:>22}" for name in rows))
    for kind_ in next(iter(rows.values())):
        cells = (f"{row[kind_]:>13.1f} ({row[kind_] / row['in all']:>6.1%})" for row in rows.values())
        print(f"{kind_:<18}" + "".join(cells))


if __name__ == "__main__":
    from mesh_megatron.platform import device

    device.prepare()
    sys.exit(main())
