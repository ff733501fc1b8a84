"""The cost of passing state: every recurrence scheme side by side in one process, then the memory operation alone.

    python benchmarks/recurrence.py                                      # small, on a CPU
    python benchmarks/recurrence.py --preset pythia-410m --bf16          # full, on a GPU

Models take turns, one forward and backward pass each, round after round. *time / base* is the median over rounds of a
model's time by that of ``base`` in the same round, *best / base* the ratio of the fastest passes; ``base again`` is a
second model like ``base``, whose ratios show how much is noise. On a CPU, time is the process's own CPU time, so that
neighbours on the machine count less. *Saved* is what the graph keeps for the backward pass, each storage once, without
parameters; *peak* is the most that was allocated at once during a pass, on top of what was there before.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mesh_megatron.config.layout import Layout
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.recurrence import SCHEMES


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time, peak memory and saved activations of mesh against base and the other schemes."""

    preset: str | None = None
    """A model of Table 1: its sizes and segments instead of those below."""
    hidden_size: int = 512
    """Width D."""
    num_attention_heads: int = 8
    """Attention heads."""
    seq_length: int = 256
    """Tokens in a sequence."""
    padded_vocab_size: int = 8192
    """Rows of the embedding."""
    segments: tuple[int, int, int] = (1, 2, 1)
    """Layers of prelude, core and coda; --loops says how often the core runs."""
    loops: tuple[int, ...] = (2, 3, 4, 8)
    """Loops K to measure, a table each."""
    schemes: tuple[str, ...] = ("vanilla", *SCHEMES)
    """Recurrences; mesh runs with every kernel that this machine has."""
    slot_sweep: bool = True
    """At the first K, also mesh with M = K+1 .. K+4 slots."""
    micro_batch_size: int = 2
    """Sequences in a pass."""
    rounds: int = 5
    """Rounds that count; two go before them."""
    bf16: bool = False
    """bfloat16 weights and activations; default float32."""
    operation: bool = True
    """Also time the chain of boundaries alone, against the bytes that it must move."""
    json: Path | None = None
    """Where to write all numbers, with command and versions."""


def main() -> int:
    from mesh_megatron.config import cli
    from mesh_megatron.config.run import RunConfig
    from mesh_megatron.parallel.groups import start_model_parallel
    from mesh_megatron.platform import device

    args = cli.parse(Arguments, description=__doc__)
    device.start_process_group()
    start_model_parallel(RunConfig())
    record = surroundings() | {"recurrence": {}}
    for loops in args.loops:
        rows = compare(variants(args, loops, sweep=args.slot_sweep and loops == args.loops[0]), args)
        record["recurrence"][str(loops)] = rows
        print(f"\nK = {loops}, {layout(args, loops)}, {record['device']}")
        show(rows)
        gc.collect()  # models hold on to themselves in circles
    if args.operation:
        record["operation"] = {str(loops): operation(args, loops) for loops in args.loops}
        for loops, rows in record["operation"].items():
            print(f"\nboundaries alone, K = {loops}")
            show(rows)
    torch.distributed.destroy_process_group()
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def surroundings() -> dict[str, Any]:
    """Return the circumstances of the measurement: command, commit, device, versions."""
    from mesh_megatron.platform import device

    return {
        "command": " ".join(sys.argv),
        "commit": commit(),
        "device": device.device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """Return the commit of this checkout; None if it has no history or git is not installed."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def layout(args: Arguments, loops: int) -> str:
    prelude, core, coda = args.segments
    if args.preset is not None:
        own = Layout.parse(PRESETS[args.preset]["layout"])
        prelude, core, coda = own.prelude, own.core, own.coda
    return f"{prelude}+{core}R{loops}+{coda}"


def kernels() -> list[str]:
    """Ways to compute the memory that run here."""
    from mesh_megatron.model.memory_op import resolve_memory_kernel
    from mesh_megatron.platform import device

    best = resolve_memory_kernel("auto", device.device())
    return ["slots", "torch"] + (["fused"] if best == "fused" else [])


def variants(args: Arguments, loops: int, sweep: bool) -> dict[str, ModelConfig]:
    """The models of one table by name."""
    sizes = {
        name: getattr(args, name) for name in ("hidden_size", "num_attention_heads", "seq_length", "padded_vocab_size")
    }
    if args.preset is not None:
        sizes = {name: value for name, value in PRESETS[args.preset].items() if name != "layout"}
    plain = ModelConfig(layout=layout(args, loops), recurrence="base", **sizes)
    models = {name: replace(plain, recurrence=name) for name in args.schemes if name != "mesh"}  # type: ignore[arg-type]
    if "mesh" in args.schemes:
        mesh = replace(plain, recurrence="mesh")
        models |= {f"mesh {kernel}": replace(mesh, memory_kernel=kernel) for kernel in kernels()}  # type: ignore[arg-type]
        if sweep:
            models |= {f"mesh M={m}": replace(mesh, num_memory_slots=m) for m in range(loops + 1, loops + 5)}
    return {"base": plain, "base again": plain} | models


def compare(models: dict[str, ModelConfig], args: Arguments) -> dict[str, dict[str, float]]:
    """A row of numbers for every model."""
    passes = {name: training_pass(model, args) for name, model in models.items()}
    seconds = interleaved(passes, args.rounds)
    rows = {}
    for name, run in passes.items():
        peak, saved = allocated(run), saved_bytes(run)
        rows[name] = {"ms": 1e3 * statistics.median(seconds[name]), "peak MB": peak / 1e6, "saved MB": saved / 1e6}
    for name, row in rows.items():
        ratios = [one / base for one, base in zip(seconds[name], seconds["base"], strict=True)]
        row["time / base"] = statistics.median(ratios)
        row["best / base"] = min(seconds[name]) / min(seconds["base"])
        row["peak / base"] = row["peak MB"] / rows["base"]["peak MB"]
        row["saved / base"] = row["saved MB"] / rows["base"]["saved MB"]
    return rows


def training_pass(model: ModelConfig, args: Any, implementation: str | None = None) -> Callable[[], Tensor]:
    """A function that runs forward and backward once on ``args.micro_batch_size`` random sequences.

    ``implementation`` of the layers: as ``--transformer-impl``.
    """
    from mesh_megatron.config.parallel import ParallelConfig
    from mesh_megatron.config.run import RunConfig
    from mesh_megatron.config.training import TrainingConfig
    from mesh_megatron.parallel.build_model import build_model
    from mesh_megatron.platform import device

    vocabulary = model.padded_vocabulary(None)
    parallel = ParallelConfig(transformer_impl=implementation)
    run = RunConfig(model=model, training=TrainingConfig(bf16=args.bf16), parallel=parallel)
    (chunk,) = build_model(run, vocabulary).chunks
    shape = (args.micro_batch_size, model.seq_length)
    tokens, labels = (torch.randint(vocabulary, shape, device=device.device()) for _ in range(2))

    def forward_backward() -> Tensor:
        chunk.zero_grad_buffer()
        loss = chunk(tokens, labels_BS=labels) / tokens.numel()
        loss.backward()
        return loss

    return forward_backward


def interleaved(
    passes: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2, queued: bool = False
) -> dict[str, list[float]]:
    """Seconds of every pass, ``rounds`` of each; the order turns by one from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    for index in range(rounds + warmup):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            elapsed = timed(passes[name], queued)
            if index >= warmup:
                seconds[name].append(elapsed)
    return seconds


def timed(run: Callable[[], Any], queued: bool = False) -> float:
    """Seconds of the GPU's clock, or of CPU time where there is none.

    ``queued`` lets launches pile up before the clock starts, for work so short that launching it takes longer.
    """
    from mesh_megatron.platform import device

    if not device.has_gpu():
        start = time.process_time()
        run()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if queued:
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def allocated(run: Callable[[], Any]) -> int:
    """Most bytes allocated at once during ``run``, on top of those at its start."""
    from mesh_megatron.platform import device

    if device.has_gpu():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes that the graph keeps for the backward pass: every storage once, parameters not counted."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


class _Block(torch.autograd.Function):
    """Stands for a block in a chain of boundaries: a fixed output, and the gradient passed on. It costs nothing."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def operation(args: Arguments, loops: int) -> dict[str, dict[str, float]]:
    """Boundaries 0..K without the blocks between them, forward and backward."""
    model = variants(args, loops, sweep=False)["base"]
    model = replace(model, recurrence="mesh")
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    passes = {f"mesh {kernel}": chain(model, args.micro_batch_size, dtype, kernel) for kernel in kernels()}
    seconds = interleaved(passes, 4 * args.rounds, queued=True)
    tokens = args.micro_batch_size * model.seq_length
    least = least_bytes(loops, tokens * model.hidden_size * dtype.itemsize)
    rows = {}
    for name, times in seconds.items():
        best = statistics.median(times)
        rows[name] = {
            "ms": 1e3 * best,
            "least MB": least / 1e6,
            "GB/s of least": least / best / 1e9,
            "saved MB": saved_bytes(passes[name]) / 1e6,
        }
    return rows


def least_bytes(loops: int, tensor: int) -> int:
    """Return the bytes of [S, B, D] tensors, of ``tensor`` bytes each, that boundaries 0..K must move (without numbers
    per token).

    Forward, boundary c reads c + 2 sources and writes a state. Backward, it reads them and its gradient, and the
    K - c later gradients; it writes y_c's, and either h_emb's (c = 0) or, with a router's share in it, its own.
    """
    forward = sum((c + 2) + 1 for c in range(loops + 1))
    backward = sum((c + 2) + 1 + (loops - c) + 1 + (c == 0 or c < loops) for c in range(loops + 1))
    return (forward + backward) * tensor


def chain(model: ModelConfig, batch: int, dtype: torch.dtype, kernel: str) -> Callable[[], None]:
    from mesh_megatron.model.memory_op import DeferredGradients, RouterWeights, next_state, route
    from mesh_megatron.platform import device

    place = device.device()
    loops, width, outputs = model.segments.loops, model.hidden_size, 2 * model.memory_slots
    shape = (model.seq_length, batch, width)
    embedding = torch.randn(shape, dtype=dtype, device=place, requires_grad=True)
    outputs_SBD = [torch.randn(shape, dtype=dtype, device=place) for _ in range(loops + 1)]
    routers = [
        RouterWeights(*(torch.randn(size, device=place, requires_grad=True) for size in ((outputs, width), (outputs,))))
        for _ in range(loops + 1)
    ]
    gradient = torch.randn(shape, dtype=dtype, device=place)
    with torch.no_grad():
        first = route(embedding, *routers[0])

    leaves = [embedding, first.requires_grad_(), *(part for router in routers for part in router[:2])]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        deferred = DeferredGradients()
        state, sources, routings = embedding, [embedding], [first]
        for cycle in range(loops + 1):
            sources.append(_Block.apply(state, outputs_SBD[cycle]))
            router = routers[cycle + 1] if cycle < loops else None
            state, routing = next_state(sources, routings, router, deferred=deferred, kernel=kernel)  # type: ignore[arg-type]
            if routing is not None:
                routings.append(routing)
        state.backward(gradient)

    return run


def show(rows: dict[str, dict[str, float]]) -> None:
    """A table, a row for each name."""
    columns = list(next(iter(rows.values())))
    print(f"{'':<14}" + "".join(f"{column:>16}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<14}" + "".join(f"{row[column]:>16.4g}" for column in columns))


if __name__ == "__main__":
    from mesh_megatron.platform import device

    device.prepare()
    sys.exit(main())
