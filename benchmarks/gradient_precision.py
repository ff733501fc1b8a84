"""Cost of --grad-reduce-in-bf16 in loss: gradients of a bfloat16 model that add up in bfloat16, against float32.

    python benchmarks/gradient_precision.py        # ten minutes on two cores

Each seed is trained twice on two data-parallel ranks with several micro-batches per step, with the same weights and
data. The text is Python's standard library, as in benchmarks/study. Runs that are complete are kept.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.study import corpus  # noqa: E402
from benchmarks.study.compare import paired_difference  # noqa: E402
from benchmarks.study.grid import Corpus  # noqa: E402
from benchmarks.study.run import VALIDATION  # noqa: E402
from mesh_megatron.checkpoint.metrics_file import METRICS_FILE, read_metrics  # noqa: E402
from mesh_megatron.config.cli import parse  # noqa: E402

ROOT = Path(__file__).parents[1]
KINDS = {"float32": [], "bfloat16": ["--grad-reduce-in-bf16"]}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Validation losses with gradients in float32 and in bfloat16."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of initial weights and data order."""
    hidden_size: int = 64
    """Width of the model."""
    layout: str = "2+2R2+2"
    """Layers of the model."""
    train_iters: int = 300
    """Steps of 2048 tokens, in four micro-batches on each rank."""
    output: Path = Path("study/gradient_precision")
    """Folder of runs and data."""
    json: Path | None = None
    """Where to write all losses, with the settings."""


def main() -> int:
    args = parse(Arguments, description=__doc__)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    data = corpus.prepare(Corpus(), output / "data").flags
    losses = {kind: {seed: validation_loss(args, output, data, kind, seed) for seed in args.seeds} for kind in KINDS}
    print("\n".join(markdown(losses)))
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name not in ("output", "json")}
        args.json.write_text(json.dumps({"settings": settings, "losses": losses}, indent=1) + "\n", encoding="utf-8")
    return 0


def validation_loss(args: Arguments, output: Path, data: list[str], kind: str, seed: int) -> float:
    """Train unless it is done, and return the loss per token (nats) after the last step."""
    save = output / f"{kind}-{seed}"
    if (found := last_loss(save, args.train_iters)) is None:
        flags = (
            f"--layout {args.layout} --recurrence mesh --hidden-size {args.hidden_size} --num-attention-heads 2 "
            f"--seq-length 128 --micro-batch-size 2 --global-batch-size 16 --train-iters {args.train_iters} --lr 4e-3 "
            f"--lr-warmup-iters 20 --bf16 --eval-interval {args.train_iters} --eval-iters 16 --split 95,5,0 "
            f"--num-workers 0 --seed {seed} --save {save} --save-interval {args.train_iters} --log-interval 50"
        )
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command = [*launcher, str(ROOT / "pretrain_mesh.py"), *flags.split(), *KINDS[kind], *data]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = last_loss(save, args.train_iters)
        assert found is not None, f"{save} has no validation loss"
    return found


def last_loss(save: Path, iteration: int) -> float | None:
    """Return the validation loss after ``iteration`` steps; None if the run has not come so far."""
    path = save / METRICS_FILE
    records = read_metrics(path) if path.exists() else []
    at_end = [record for record in records if record["iteration"] == iteration and VALIDATION in record]
    return at_end[-1][VALIDATION] if at_end else None


def markdown(losses: dict[str, dict[int, float]]) -> list[str]:
    """Return the lines of a table, and the mean difference inside a seed with its 95% interval."""
    lines = ["| gradients | loss by seed | mean |", "|---|---|---|"]
    for kind, by_seed in losses.items():
        shown = ", ".join(f"{seed}: {loss:.4f}" for seed, loss in by_seed.items())
        lines.append(f"| {kind} | {shown} | {statistics.mean(by_seed.values()):.4f} |")
    found = paired_difference(losses["bfloat16"], losses["float32"])
    if found is not None:
        half = "" if found.half_width is None else f" ± {found.half_width:.4f}"
        lines += ["", f"bfloat16 - float32: {found.mean:+.4f}{half}"]
    return lines


if __name__ == "__main__":
    sys.exit(main())
