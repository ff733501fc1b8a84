"""AdamW against Muon at equal tokens: validation loss of recurrence schemes, each optimizer at its best rate.

    python benchmarks/optimizers.py                                     # an hour or two on two free cores
    python benchmarks/optimizers.py --seeds 1 --train-iters 120         # less

The model, its data and the way cells are trained are those of benchmarks/study. The same command continues where it
stopped: finished cells are kept. The rate is chosen by the mean over seeds, on the same data that is reported.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.study import corpus, run  # noqa: E402
from benchmarks.study.grid import Cell, Corpus  # noqa: E402
from mesh_megatron.config.cli import parse  # noqa: E402

MUON: dict[str, Any] = {"optimizer": "muon", "muon_extra_scale_factor": 0.2, "weight_decay": 0.1}
OPTIMIZERS: dict[str, dict[str, Any]] = {"AdamW": {"weight_decay": 0.1}, "Muon": MUON}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Validation loss at equal tokens of AdamW and Muon."""

    schemes: tuple[str, ...] = ("base", "mesh", "anchor_emb")
    """Values of --recurrence."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of initial weights and data order."""
    adamw_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """Learning rates of AdamW."""
    muon_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """Learning rates with Muon, for all parameters."""
    hidden_size: int = 64
    """Width of the model."""
    layout: str = "1+2R2+1"
    """Layers of the model."""
    train_iters: int = 640
    """Steps of 2048 tokens."""
    output: Path = Path("study/optimizers")
    """Folder of cells and data."""
    workers: int | None = None
    """Cells trained at the same time; default one for each core."""
    json: Path | None = None
    """Where to write all losses, with the settings."""


def main() -> int:
    args = parse(Arguments, description=__doc__)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    found = list(cells(args))
    tokens = corpus.prepare(Corpus(), output / "data")
    failed = run.Trainer(output, tokens, run.places(args.workers, 0)).train(found)
    losses = {cell: run.final_loss(output, cell) for cell in found}
    rows = table(args, {cell: loss for cell, loss in losses.items() if loss is not None})
    print("\n".join(markdown(rows)))
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name not in ("output", "json", "workers")}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


def cells(args: Arguments) -> Iterator[Cell]:
    """Yield the cells, seed by seed: a run that is stopped early has complete comparisons."""
    rates = {"AdamW": args.adamw_rates, "Muon": args.muon_rates}
    for seed, scheme, optimizer in product(args.seeds, args.schemes, OPTIMIZERS):
        for rate in rates[optimizer]:
            training = {
                "train_iters": args.train_iters,
                "micro_batch_size": 16,
                "lr": rate,
                "lr_warmup_iters": min(20, args.train_iters // 8),
                "eval_interval": args.train_iters,
                "eval_iters": 8,
                "seed": seed,
            }
            settings: dict[str, dict[str, Any]] = {
                "model": {
                    "layout": args.layout,
                    "recurrence": scheme,
                    "hidden_size": args.hidden_size,
                    "num_attention_heads": max(1, args.hidden_size // 32),
                    "seq_length": 128,
                },
                "training": training | OPTIMIZERS[optimizer],
                "data": {"split": "95,5,0", "num_workers": 0},
                "checkpoint": {"save_interval": args.train_iters, "keep_last": 1},
                "logging": {"log_interval": 20},
            }
            yield Cell(f"{optimizer} {rate:g}", scheme, seed, settings)


def table(args: Arguments, losses: dict[Cell, float]) -> list[dict[str, Any]]:
    """Return a row for each scheme and optimizer: losses by rate and seed, and the best rate by their mean."""
    rows = []
    for scheme, optimizer in product(args.schemes, OPTIMIZERS):
        by_rate: dict[str, dict[int, float]] = {}
        for cell, loss in losses.items():
            name, _, rate = cell.setup.partition(" ")
            if (name, cell.scheme) == (optimizer, scheme):
                by_rate.setdefault(rate, {})[cell.seed] = loss
        if by_rate:
            best = min(by_rate, key=lambda rate: statistics.mean(by_rate[rate].values()))
            rows.append({"scheme": scheme, "optimizer": optimizer, "losses": by_rate, "best": best})
    return rows


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table; spread is the standard deviation over seeds at the best rate."""
    lines = ["| scheme | optimizer | best rate | loss | spread | by rate |", "|---|---|---|---|---|---|"]
    for row in rows:
        best = list(row["losses"][row["best"]].values())
        spread = f"{statistics.stdev(best):.4f}" if len(best) > 1 else "-"
        every = ", ".join(f"{rate}: {statistics.mean(by.values()):.3f}" for rate, by in row["losses"].items())
        cells_of_row = (row["scheme"], row["optimizer"], row["best"], f"{statistics.mean(best):.4f}", spread, every)
        lines.append(f"| {' | '.join(cells_of_row)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
