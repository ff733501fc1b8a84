"""Measurements of the ring in one training step: what it sends, holds and waits for.

    for ranks in 1 2 4; do torchrun --nproc-per-node $ranks benchmarks/ring_traffic.py; done
    python benchmarks/ring_traffic.py --report

The first line writes ``benchmarks/results/ring_pp{ranks}.json``; the second prints the tables of docs/parallelism.md
from those files and draws the timeline. Nothing is timed: bytes and the order of work do not depend on the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from mesh_megatron.config import cli  # noqa: E402
from mesh_megatron.config.model import ModelConfig  # noqa: E402
from mesh_megatron.config.parallel import ParallelConfig  # noqa: E402
from mesh_megatron.config.run import RunConfig  # noqa: E402
from mesh_megatron.config.training import TrainingConfig  # noqa: E402
from mesh_megatron.planning.pipeline_schedule import RingTimes, Task, Work, bubble, replay  # noqa: E402

LAYOUT, MICRO_BATCHES, VOCABULARY = "4+4R2+4", 8, 256
MODELS = ("vanilla", "base", "mesh")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the ring over the ranks that torchrun starts, or report what was measured."""

    results: Path = ROOT / "benchmarks/results"
    """Folder of the measurements."""
    report: bool = False
    """Print tables and draw the timeline from the measurements of 1, 2 and 4 ranks."""


def run_config(recurrence: Any, ranks: int) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            layout=LAYOUT, recurrence=recurrence, hidden_size=64, num_attention_heads=4, seq_length=64,
            padded_vocab_size=VOCABULARY,
        ),
        parallel=ParallelConfig(pipeline_model_parallel_size=ranks),
        training=TrainingConfig(train_iters=2, micro_batch_size=2, global_batch_size=2 * MICRO_BATCHES),
    )  # fmt: skip


class Instruments:
    """Counts one step's messages, notes the order of work, and follows the history of every micro-batch."""

    def __init__(self) -> None:
        self.hops: Counter[int] = Counter()  # messages by their size in bytes
        self.work: Work = []
        self.history: dict[int, set] = {}  # by micro-batch, weak references to storages
        self.peak_of_one = self.peak_of_all = self.most_in_flight = 0
        self._begun: Counter[tuple[str, int]] = Counter()
        self._forward_of: dict[int, tuple[int, int]] = {}
        self._outputs: list[Any] = []  # kept, so that no two share an identity

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        import torch.distributed as dist
        from megatron.core.pipeline_parallel import schedules

        from mesh_megatron.parallel.ring import RingChunk

        places = [
            (dist, "isend"),
            (schedules, "forward_step"),
            (schedules, "backward_step"),
            (RingChunk, "_enter_cycle"),
        ]
        originals = [getattr(owner, name) for owner, name in places]
        wrappers = [self._count_send, self._note_forward, self._note_backward, self._follow_history]
        try:
            for (owner, name), original, wrapper in zip(places, originals, wrappers, strict=True):
                setattr(owner, name, wrapper(original))
            yield
        finally:
            for (owner, name), original in zip(places, originals, strict=True):
                setattr(owner, name, original)

    def _count_send(self, original: Any) -> Any:
        def isend(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.hops[tensor.numel() * tensor.element_size()] += 1
            return original(tensor, *args, **kwargs)

        return isend

    def _note_forward(self, original: Any) -> Any:
        def forward_step(function: Any, data: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            chunk = getattr(model.module, "chunk", 0)
            micro_batch = self._next("F", chunk)
            result = original(function, data, model, *args, **kwargs)
            output = result[0]
            self._outputs.append(output)
            self._forward_of[id(output)] = (chunk, micro_batch)
            return result

        return forward_step

    def _note_backward(self, original: Any) -> Any:
        def backward_step(input_tensor: Any, output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.work.append(("B", *self._forward_of[id(output_tensor)]))
            return original(input_tensor, output_tensor, *args, **kwargs)

        return backward_step

    def _follow_history(self, original: Any) -> Any:
        import torch
        from torch.multiprocessing.reductions import StorageWeakRef

        def enter_cycle(chunk: Any, *inputs: Any) -> Any:
            micro_batch = self._begun["F", chunk.chunk] - 1
            state = original(chunk, *inputs)
            held = [state, chunk._input] + (list(chunk.outbox[-1].values()) if not chunk.last_chunk else [])
            storages = self.history.setdefault(micro_batch, set())
            storages.update(
                (StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()) for t in held if torch.is_tensor(t)
            )
            self._look()
            return state

        return enter_cycle

    def _look(self) -> None:
        live = [sum(size for ref, size in held if not ref.expired()) for held in self.history.values()]
        self.peak_of_one = max(self.peak_of_one, *live)
        self.peak_of_all = max(self.peak_of_all, sum(live))
        self.most_in_flight = max(self.most_in_flight, sum(size > 0 for size in live))

    def _next(self, kind: str, chunk: int) -> int:
        micro_batch = self._begun[kind, chunk]
        self._begun[kind, chunk] += 1
        self.work.append((kind, chunk, micro_batch))
        return micro_batch


def measure(recurrence: str, ranks: int) -> dict[str, Any]:
    """One instrumented step of one model: what this rank sent, did and holds."""
    import torch

    from mesh_megatron.parallel.build_model import build_model
    from mesh_megatron.parallel.groups import start_model_parallel, stop_model_parallel
    from mesh_megatron.training.optimizer import build_optimizer
    from mesh_megatron.training.step import train_step

    run = run_config(recurrence, ranks)
    run.training.validate_batch(1)
    start_model_parallel(run)
    model = build_model(run, VOCABULARY)
    optimizer = build_optimizer(run, model)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(MICRO_BATCHES):
            row = torch.randint(VOCABULARY, (run.training.micro_batch_size, run.model.seq_length + 1))
            yield {"tokens": row[:, :-1], "labels": row[:, 1:], "loss_mask": torch.ones(row[:, 1:].shape)}

    train_step(model, optimizer, batches(), MICRO_BATCHES, run.training.micro_batch_size)  # Adam has its state now
    instruments = Instruments()
    with instruments.installed():
        train_step(model, optimizer, batches(), MICRO_BATCHES, run.training.micro_batch_size)
    result = {
        "hops": dict(instruments.hops),
        "work": instruments.work,
        "history": [instruments.peak_of_one, instruments.peak_of_all, instruments.most_in_flight],
        "bytes": held_bytes(model, optimizer),
        "state_bytes": run.model.seq_length * run.training.micro_batch_size * run.model.hidden_size * 4,
    }
    stop_model_parallel()
    return result


def held_bytes(model: Any, optimizer: Any) -> dict[str, int]:
    """Bytes this rank holds: blocks (layers) and the rest (embedding, routers, head), each with its gradients and
    optimizer state; ``buffers`` is what data parallelism has allocated for gradients, padding included."""
    from mesh_megatron.checkpoint.optimizer_state import sub_optimizers

    state = {id(p): s for part in sub_optimizers(optimizer) for p, s in part.optimizer.state.items()}
    held = Counter({"buffers": sum(b.grad_data.nbytes for chunk in model.chunks for b in chunk.buffers)})
    parameters = {p: name for module in model.modules for name, p in module.named_parameters()}
    for parameter, name in parameters.items():
        group = "rest" if name.startswith(("embedding", "recurrence", "final_norm", "output_layer")) else "blocks"
        adam = state.get(id(getattr(parameter, "main_param", parameter)), {})
        held[f"{group} parameters"] += parameter.nbytes
        held[f"{group} gradients"] += parameter.main_grad.nbytes
        held[f"{group} optimizer"] += sum(adam[kind].nbytes for kind in ("exp_avg", "exp_avg_sq"))
    return dict(held)


def record(settings: Settings) -> None:
    """Measure every model on all ranks; rank 0 writes."""
    from mesh_megatron.platform import device

    device.prepare()
    import torch.distributed as dist

    device.start_process_group()
    results = {}
    for model in MODELS:
        everyone: list[Any] = [None] * device.world_size()
        dist.all_gather_object(everyone, measure(model, device.world_size()))
        results[model] = everyone
    if device.rank() == 0:
        path = settings.results / f"ring_pp{device.world_size()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results) + "\n")
        print(f"measured: {path}")
    dist.barrier()
    dist.destroy_process_group()


def layers_held(ranks: int) -> list[list[int]]:
    from mesh_megatron.config.layout import Layout, share

    layout = Layout.parse(LAYOUT)
    sizes = [layout.prelude, *[layout.core] * layout.loops, layout.coda]
    return [[len(share(range(size), rank, ranks)) for size in sizes] for rank in range(ranks)]


def report(settings: Settings) -> None:
    """Print the tables of docs/parallelism.md in Markdown, and draw the timeline."""
    measured = {n: json.loads((settings.results / f"ring_pp{n}.json").read_text()) for n in (1, 2, 4)}
    print("| ranks | model | hops per step | bytes per hop | one [S, B, D] tensor |\n|---|---|---|---|---|")
    for ranks in (2, 4):
        for model in MODELS:
            everyone = measured[ranks][model]
            sizes = sum((Counter(rank["hops"]) for rank in everyone), Counter())
            state = everyone[0]["state_bytes"]
            print(f"| {ranks} | {model} | {sum(sizes.values())} | {', '.join(sizes)} | {state} |")
    print("\n| ranks | of a rank: blocks' parameters | gradients | optimizer | share of one process |")
    print("|---|---|---|---|---|")
    for ranks in (1, 2, 4):
        names = [f"blocks {kind}" for kind in ("parameters", "gradients", "optimizer")]
        most = [max(rank["bytes"][name] for rank in measured[ranks]["mesh"]) for name in names]
        total = sum(rank["bytes"][names[0]] for rank in measured[ranks]["mesh"])
        whole = measured[1]["mesh"][0]["bytes"][names[0]]
        shown = " | ".join(f"{size:,}" for size in most)
        print(f"| {ranks} | {shown} | {most[0] / whole:.4f} (all ranks together {total / whole:.4f}) |")
    print("\n| ranks | model | history of one micro-batch | micro-batches in flight | at once | in [S, B, D] tensors |")
    print("|---|---|---|---|---|---|")
    for ranks in (2, 4):
        for model in MODELS:
            first = measured[ranks][model][0]
            one, everything, count = first["history"]
            print(f"| {ranks} | {model} | {one:,} | {count} | {everything:,} | {one / first['state_bytes']:.2f} |")
    print("\n| ranks | bubble | the formula (P - 1) / (m v + P - 1) |\n|---|---|---|")
    timelines = {
        ranks: replay([r["work"] for r in measured[ranks]["mesh"]], RingTimes.of_layers(layers_held(ranks)))
        for ranks in (2, 4)
    }
    for ranks, tasks in timelines.items():
        chunks = len(layers_held(ranks)[0])
        print(f"| {ranks} | {bubble(tasks):.2%} | {(ranks - 1) / (MICRO_BATCHES * chunks + ranks - 1):.2%} |")
    draw(timelines, settings.results / "ring_timeline.png")


def draw(timelines: dict[int, list[Task]], path: Path) -> None:
    """Draw a timeline with one row per rank and one colour per chunk; backward passes are darker, and numbers are
    micro-batches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ["prelude", "core, loop 0", "core, loop 1", "coda"]
    colours = ["#4e79a7", "#f28e2b", "#e15759", "#59a14f"]
    figure, axes = pyplot.subplots(
        len(timelines), 1, figsize=(15, 5), height_ratios=list(timelines), layout="constrained"
    )
    for axis, (ranks, tasks) in zip(axes, timelines.items(), strict=True):
        for task in tasks:
            width = task.stop - task.start
            shade = 0.45 if task.kind == "F" else 1.0
            axis.barh(task.rank, width, left=task.start, height=0.9, color=colours[task.chunk], alpha=shade, lw=0)
            axis.text(task.start + width / 2, task.rank, task.micro_batch, ha="center", va="center", fontsize=5)
        axis.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
        axis.invert_yaxis()
        axis.set_xlim(0, max(task.stop for task in tasks))
        axis.set_title(f"{ranks} ranks: {bubble(tasks):.1%} of the time waiting", fontsize=9)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    axes[-1].set_xlabel("time, in forward passes of one layer (light forward, dark backward; digits are micro-batches)")
    figure.savefig(path, dpi=110)
    print(f"\ntimeline: {path}")


def main() -> int:
    settings = cli.parse(Settings, prog="ring_traffic.py")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    report(settings) if settings.report else record(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
