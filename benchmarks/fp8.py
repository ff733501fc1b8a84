"""FP8 against bfloat16: speed, memory, and the loss of real training.

    python benchmarks/fp8.py --preset pythia-410m --micro-batch-size 4 --json benchmarks/results/fp8.json

Each contestant trains its own model from the same weights on the same batches, in turns of ``--turn`` steps in one
process; time is compared turn by turn. The text is a .bin/.idx or, without one, the bytes of Python's standard
library. *Peak* is what a contestant holds, weights and optimizer included, and the most that a step adds (on a CPU
only that). Needs a GPU that has FP8, and Transformer Engine; bfloat16 alone (``--bf16-only``) runs anywhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from recurrence import allocated, show, surroundings, timed
from torch import Tensor

from mesh_megatron.config.fp8 import Fp8Config
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time, memory and loss of each FP8 recipe beside bfloat16."""

    preset: str | None = None
    """A model of Table 1 instead of the sizes below."""
    layout: str = "2+4R2+2"
    """Layers."""
    hidden_size: int = 512
    """Width D."""
    num_attention_heads: int = 8
    """Attention heads."""
    seq_length: int = 512
    """Tokens in a sequence."""
    padded_vocab_size: int = 8192
    """Rows of the embedding; must hold the text's ids."""
    recipes: tuple[str, ...] = ("tensorwise", "delayed", "blockwise")
    """FP8 recipes beside bfloat16; mxfp8 on Blackwell."""
    bf16_only: bool = False
    """Train in bfloat16 alone, without any of them."""
    fp8_format: str = "hybrid"
    """Format of all of them."""
    core_only: bool = False
    """Leave prelude and coda in bfloat16."""
    data_path: str | None = None
    """Prefix of a .bin/.idx with the text."""
    micro_batch_size: int = 4
    """Sequences in a step."""
    steps: int = 200
    """Training steps of each."""
    turn: int = 10
    """Steps that one takes before the next one's turn; the first turn is not timed."""
    lr: float = 3e-4
    """Learning rate, constant."""
    json: Path | None = None
    """Where to write all numbers, with command and versions."""


class Contestant:
    """One model, its optimizer, and the steps it takes."""

    def __init__(self, run: RunConfig, vocabulary: int, sequences: Tensor) -> None:
        from mesh_megatron.parallel.build_model import build_model
        from mesh_megatron.training.optimizer import build_optimizer

        self.run, self.sequences = run, sequences
        self.model = build_model(run, vocabulary)
        self.optimizer = build_optimizer(run, self.model)
        self.losses: list[float] = []
        self.scaling: list[dict] = [{}, {}, {}]

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The next step's sequences; every contestant sees the same."""
        size = self.run.training.micro_batch_size
        rows = self.sequences[(torch.arange(size) + len(self.losses) * size) % len(self.sequences)]
        yield {"tokens": rows[:, :-1], "labels": rows[:, 1:], "loss_mask": torch.ones(size, rows.shape[1] - 1)}

    def step(self) -> None:
        from mesh_megatron.training.step import train_step

        size = self.run.training.micro_batch_size
        with only_scaling_of(self):
            result = train_step(self.model, self.optimizer, self.batches(), 1, size)
        self.losses.append(result.loss)

    def take(self, steps: int) -> None:
        for _ in range(steps):
            self.step()


@contextmanager
def only_scaling_of(contestant: Contestant) -> Iterator[None]:
    """Delayed scaling keeps its histories for the whole process; the others' passes must not work on them too."""
    if importlib.util.find_spec("transformer_engine") is None:
        yield
        return
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as Manager

    names = ("global_amax_buffer", "global_amax_history_buffer", "global_scale_buffer")
    for name, own in zip(names, contestant.scaling, strict=True):
        setattr(Manager, name, own)
    yield
    contestant.scaling = [getattr(Manager, name) for name in names]


def main() -> int:
    from mesh_megatron.config import cli
    from mesh_megatron.parallel.fp8_support import check_fp8
    from mesh_megatron.parallel.groups import start_model_parallel
    from mesh_megatron.platform import device

    args = cli.parse(Arguments, description=__doc__)
    runs = settings(args)
    try:
        for run in runs.values():
            run.fp8.validate(run.model, run.parallel, run.training)
            check_fp8(run)
    except ValueError as error:
        print(f"fp8.py: {error}", file=sys.stderr)
        return 2
    device.start_process_group()
    start_model_parallel(next(iter(runs.values())))
    sequences = text(args, runs["bf16"].model.seq_length)
    contestants: dict[str, Contestant] = {}
    peaks: dict[str, int] = {}
    for name, run in runs.items():
        before = torch.cuda.memory_allocated()
        one = contestants[name] = Contestant(run, run.model.padded_vocabulary(None), sequences)
        one.take(args.turn - 1)
        held = torch.cuda.memory_allocated() - before
        peaks[name] = held + allocated(one.step)
    rows = compare(contestants, peaks, args)
    record = surroundings() | {"losses": {name: one.losses for name, one in contestants.items()}, "rows": rows}
    print(f"{runs['bf16'].model.layout}, hidden {runs['bf16'].model.hidden_size}, {record['device']}")
    show(rows)
    torch.distributed.destroy_process_group()
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def settings(args: Arguments) -> dict[str, RunConfig]:
    """A run for each contestant, bf16 first."""
    names = ("layout", "hidden_size", "num_attention_heads", "seq_length", "padded_vocab_size")
    sizes = PRESETS[args.preset] if args.preset is not None else {name: getattr(args, name) for name in names}
    training = TrainingConfig(bf16=True, lr=args.lr, micro_batch_size=args.micro_batch_size, train_iters=args.steps)
    plain = RunConfig(model=ModelConfig(**sizes), training=training)
    runs = {"bf16": plain}
    for recipe in () if args.bf16_only else args.recipes:
        fp8 = Fp8Config(fp8_format=args.fp8_format, fp8_recipe=recipe, fp8_core_only=args.core_only)  # type: ignore[arg-type]
        runs[recipe] = replace(plain, fp8=fp8)
    return runs


def text(args: Arguments, length: int) -> Tensor:
    """[N, length + 1] token ids."""
    from mesh_megatron.data.indexed import read_indexed

    wanted = args.steps * args.micro_batch_size * (length + 1)
    if args.data_path is not None:
        tokens = torch.from_numpy(read_indexed(args.data_path).tokens[:wanted].astype("int64"))
    else:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        content = b"\0".join(file.read_bytes() for file in files)[:wanted]
        tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    return tokens[: len(tokens) // (length + 1) * (length + 1)].view(-1, length + 1)


def compare(contestants: dict[str, Contestant], peaks: dict[str, int], args: Arguments) -> dict[str, dict[str, float]]:
    """A row of numbers for each, from the turns after the first; ``peaks`` in bytes."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(args.steps // args.turn - 1):
        for name, one in contestants.items():
            seconds[name].append(timed(lambda one=one: one.take(args.turn)) / args.turn)  # type: ignore[misc]
    rows = {}
    for name, one in contestants.items():
        speeds = [theirs / own for theirs, own in zip(seconds["bf16"], seconds[name], strict=True)]
        last, reference = (statistics.mean(losses[-20:]) for losses in (one.losses, contestants["bf16"].losses))
        rows[name] = {
            "ms": 1e3 * statistics.median(seconds[name]),
            "speed / bf16": statistics.median(speeds),
            "peak MB": peaks[name] / 1e6,
            "peak / bf16": peaks[name] / peaks["bf16"],
            "loss": last,
            "loss - bf16": last - reference,
        }
    return rows


if __name__ == "__main__":
    from mesh_megatron.platform import device

    device.prepare()
    sys.exit(main())
