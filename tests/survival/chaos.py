"""Kill and restart a run many times, and compare its results with those of a run without interruption.

python tests/survival/chaos.py --kills 200 --seed 7    (make chaos)
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[level]) for level in (0, 1, 2)]

import rank_preload  # noqa: E402, F401  (before megatron.core)
import torch  # noqa: E402
from fleet import Fleet  # noqa: E402
from integration_runs import final, small_corpus, weights  # noqa: E402
from tqdm import tqdm  # noqa: E402

from mesh_megatron.checkpoint.folder import TRACKER  # noqa: E402
from mesh_megatron.checkpoint.metrics_file import read_metrics  # noqa: E402

STEPS_A_KILL = 8  # a kill costs two steps on average, on a busy machine up to ten
CALLS = 6
MODEL = [
    *("--layout", "2+2R2+2", "--hidden-size", "16", "--num-attention-heads", "2", "--seq-length", "16"),
    *("--tokenizer-type", "ByteLevelTokenizer", "--split", "60,20,20", "--lr", "3e-3"),
    *("--micro-batch-size", "1", "--global-batch-size", "4", "--log-interval", "1"),
    *("--eval-interval", "4", "--eval-iters", "2", "--save-interval", "3", "--keep-last", "2", "--async-save"),
]
RING = [
    *("--pipeline-model-parallel-size", "2", "--use-distributed-optimizer", "--ddp-bucket-size", "2000"),
    *("--overlap-grad-reduce", "--overlap-param-gather", "--num-workers", "0"),
]
LAYOUTS = {"one": (1, ["--num-workers", "1"]), "ring": (4, RING)}
TIMES = ("iteration-time", "tokens per second", "TFLOP/s per rank")


@dataclass(frozen=True)
class Point:
    """A moment inside a rank: a call of ``name`` in ``module``, and the processes that reach it."""

    module: str
    name: str
    rank_zero: bool = False
    calls: int = 1
    """The call that kills is drawn from this many."""
    after: bool = False
    """Kill after the call returns, not before it begins."""
    when: Callable[..., bool] = lambda *args, **kwargs: True


POINTS = {
    "index": Point("megatron.core.datasets.gpt_dataset", "GPTDataset._build_document_sample_shuffle_indices",
                   rank_zero=True, calls=3, after=True),
    "loading": Point("mesh_megatron.training.checkpointer", "Checkpointer.load"),
    "step": Point("mesh_megatron.training.step", "update_weights", calls=CALLS),
    "update": Point("mesh_megatron.training.step", "update_weights", calls=CALLS, after=True),
    "log": Point("mesh_megatron.training.metrics.writer", "MetricsWriter.note", rank_zero=True, calls=CALLS),
    "evaluation": Point("mesh_megatron.training.trainer", "evaluation_sums", calls=3),
    "save": Point("mesh_megatron.training.checkpointer", "request_save", calls=2, after=True),
    "writing": Point("mesh_megatron.checkpoint.manifest", "describe"),
    "publish": Point("mesh_megatron.training.checkpointer", "Checkpointer._publish", calls=2),
    "rename": Point("mesh_megatron.training.checkpointer", "write_manifest", rank_zero=True, calls=2, after=True),
    "tracker": Point("mesh_megatron.training.checkpointer", "write_atomically", rank_zero=True, calls=2,
                     when=lambda path, text: path.name == TRACKER),
    "prune": Point("mesh_megatron.training.checkpointer", "Checkpointer._prune", rank_zero=True, calls=2),
}  # fmt: skip


@dataclass(frozen=True)
class KillAt:
    """Runs in every rank before main: kills the rank ``victim`` at the ``call``-th call of a point."""

    point: str
    victim: int
    call: int

    def __call__(self, rank: int) -> None:
        if rank != self.victim:
            return
        point, pid, calls = POINTS[self.point], os.getpid(), 0
        owner: Any = importlib.import_module(point.module)
        *classes, name = point.name.split(".")
        for part in classes:
            owner = getattr(owner, part)
        original = getattr(owner, name)

        def deadly(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += point.when(*args, **kwargs)
            if calls == self.call and not point.after:
                os.kill(pid, signal.SIGKILL)  # also from a process that writes for the rank
            result = original(*args, **kwargs)
            if calls == self.call:
                os.kill(pid, signal.SIGKILL)
            return result

        setattr(owner, name, deadly)


def chaos(layout: str, kills: int, seed: int, corpus: str, folder: Path) -> Counter[str]:
    """Return how often the run was killed at each moment; raise if its result differs from an uninterrupted run."""
    ranks, flags = LAYOUTS[layout]
    flags = [*MODEL, *flags, "--data-path", corpus, "--train-iters", str(STEPS_A_KILL * kills)]
    whole = folder / "whole"
    with Fleet(ranks, [*flags, "--save", whole, "--data-cache-path", folder / "cache"], folder / "logs") as fleet:
        assert fleet.exit_codes() == [0] * ranks, "\n".join(fleet.output(rank)[-2000:] for rank in range(ranks))
    draw, deaths = random.Random(seed), Counter[str]()
    killed = folder / "killed"
    flags += ["--save", str(killed), "--data-cache-path", str(folder / "cache of the killed")]
    # Use every moment equally often, in an order drawn from the seed. But an index is built only once, and a checkpoint
    # is loaded only if one is left after pruning.
    moments = ["prune", *(name for name in (*POINTS, "any time") if name not in ("index", "prune"))]
    first, *rest = (moments[number % len(moments)] for number in range(kills - 1))
    draw.shuffle(rest)
    with tqdm(total=kills, desc=f"{layout}: kills", disable=None) as bar:
        for moment in ["index", first, *rest]:
            while not _attempt(ranks, flags, folder / "logs", moment, draw):
                moment = draw.choice(moments)  # the run did not reach the moment: kill it at another
            deaths[moment] += 1
            bar.update()
    with Fleet(ranks, flags, folder / "logs") as fleet:
        assert fleet.exit_codes() == [0] * ranks, fleet.output(0)[-3000:]
    compare(whole, killed)
    return deaths


def _attempt(ranks: int, flags: list[str], logs: Path, moment: str, draw: random.Random) -> bool:
    """Start the run and kill it; return False if it ended before that."""
    before = None
    if moment in POINTS:
        victim = 0 if POINTS[moment].rank_zero else draw.randrange(ranks)
        before = KillAt(moment, victim, draw.randint(1, POINTS[moment].calls))
    with Fleet(ranks, flags, logs, before) as fleet:
        if before is None:
            fleet.wait_for_steps(draw.randrange(CALLS))
            time.sleep(draw.uniform(0, 0.1))
            fleet.kill(*draw.sample(range(ranks), draw.randint(1, ranks)))
        died = fleet.killed()
        if draw.random() < 0.5:  # end the other ranks as torchrun does, or kill all at once
            fleet.end(seconds=10)
    return died


def compare(whole: Path, killed: Path) -> None:
    """Compare every record and every tensor bitwise, and the names of all files."""
    for one, other in zip(records(whole), records(killed), strict=True):
        assert one == other, f"{other} instead of {one}"
    ours, theirs = weights(final(whole)), weights(final(killed))
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"different numbers in {different}"
    assert {path.name for path in whole.iterdir()} == {path.name for path in killed.iterdir()}


def records(save: Path) -> list[str]:
    """Return the records of metrics.jsonl without times and speeds."""
    return [
        json.dumps({name: value for name, value in record.items() if name not in TIMES})
        for record in read_metrics(save / "metrics.jsonl")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how often each layout's run dies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    args = parser.parse_args()
    if args.kills < 2:
        parser.error(f"--kills {args.kills}: must be at least 2")
    for layout in args.layouts:
        with tempfile.TemporaryDirectory() as folder:
            deaths = chaos(layout, args.kills, args.seed, small_corpus(Path(folder)), Path(folder))
        print(f"{layout}: bitwise equal after {sum(deaths.values())} killed ranks: {dict(sorted(deaths.items()))}")


if __name__ == "__main__":
    main()
