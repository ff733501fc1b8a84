"""AdamW against Muon at equal tokens: validation loss of recurrence schemes, each optimizer at its best rate.

    python benchmarks/optimizers.py                                     # half an hour on two free cores
    python benchmarks/optimizers.py --schemes base --train-iters 120    # minutes

Scheme by scheme, each optimizer is trained at all of its rates with one seed, which only chooses the rate, and then at
the best one with the seeds that are reported. The model, its data and the way cells are trained are those of
benchmarks/study. The same command continues where it stopped: finished cells are kept.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.study import corpus, run  # noqa: E402
from benchmarks.study.compare import paired_difference  # noqa: E402
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
    """Seeds of initial weights and data order whose losses are reported."""
    tuning_seed: int = 11
    """Seed with which the rate is chosen."""
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

    def rates(self, optimizer: str) -> tuple[float, ...]:
        """Return the rates to try."""
        return {"AdamW": self.adamw_rates, "Muon": self.muon_rates}[optimizer]


@dataclass(frozen=True)
class Row:
    """Losses of a scheme with an optimizer."""

    scheme: str
    optimizer: str
    rate: float
    """The best one."""
    by_rate: dict[float, float]
    """Losses of the tuning seed, at each rate."""
    by_seed: dict[int, float]
    """Losses of the reported seeds, at the best rate."""


def main() -> int:
    args = parse(Arguments, description=__doc__)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    trainer = run.Trainer(output, corpus.prepare(Corpus(), output / "data"), run.places(args.workers, 0))
    rows, failed = [], False
    for scheme in args.schemes:
        tuning = {
            name: [cell(args, scheme, name, rate, args.tuning_seed) for rate in args.rates(name)] for name in OPTIMIZERS
        }
        failed |= bool(trainer.train([tried for several in tuning.values() for tried in several]))
        by_rate = {name: losses(output, tried) for name, tried in tuning.items()}
        best = {name: min(found, key=lambda rate: found[rate]) for name, found in by_rate.items() if found}
        chosen = {name: [cell(args, scheme, name, best[name], seed) for seed in args.seeds] for name in best}
        failed |= bool(trainer.train([kept for several in chosen.values() for kept in several]))
        for name in best:
            by_seed = {kept.seed: loss for kept in chosen[name] if (loss := run.final_loss(output, kept)) is not None}
            rows.append(Row(scheme, name, best[name], by_rate[name], by_seed))
    print("\n".join(markdown(rows)))
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name not in ("output", "json", "workers")}
        record = {"settings": settings, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


def losses(output: Path, cells: list[Cell]) -> dict[float, float]:
    """Return the final loss of each cell that is done, by its learning rate."""
    found = ((cell.settings["training"]["lr"], run.final_loss(output, cell)) for cell in cells)
    return {rate: loss for rate, loss in found if loss is not None}


def cell(args: Arguments, scheme: str, optimizer: str, rate: float, seed: int) -> Cell:
    """Make the cell of a scheme, an optimizer, its rate and a seed."""
    training = {
        "train_iters": args.train_iters,
        "micro_batch_size": 16,
        "lr": rate,
        "lr_warmup_iters": min(20, args.train_iters // 8),
        "eval_interval": args.train_iters,
        "eval_iters": 32,
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
    return Cell(f"{optimizer} {rate:g}", scheme, seed, settings)


def markdown(rows: list[Row]) -> list[str]:
    """Return the lines of a table; "- AdamW" is the mean difference inside a seed, with its 95% interval."""
    lines = [
        "| scheme | optimizer | rates tried: loss | best | loss | spread | - AdamW | 95% interval | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    reference = {row.scheme: row.by_seed for row in rows if row.optimizer == "AdamW"}
    for row in rows:
        values = list(row.by_seed.values())
        tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in row.by_rate.items())
        mean = f"{statistics.mean(values):.4f}" if values else "-"
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
        difference = "|"
        if row.optimizer != "AdamW" and (found := paired_difference(row.by_seed, reference.get(row.scheme, {}))):
            half = found.half_width
            interval = "one seed" if half is None else f"{found.mean - half:+.4f} to {found.mean + half:+.4f}"
            difference = f"{found.mean:+.4f} | {interval}"
        values_of_row = (row.scheme, row.optimizer, tried, f"{row.rate:g}", mean, spread, difference, str(len(values)))
        lines.append(f"| {' | '.join(values_of_row)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
