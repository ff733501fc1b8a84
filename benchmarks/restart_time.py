"""Seconds from `kill -9` of one rank until the first new step, with torchrun and with tools/launch.py.

    python benchmarks/restart_time.py                       # five kills of each, minutes on two free cores
    python benchmarks/restart_time.py --repetitions 1 --rank 0 --launchers launch

A small model is trained on CPU ranks with --max-restarts. Some steps after a checkpoint one rank is killed. *ranks end*
is the time until the last of the old processes is gone, *launcher* the time until the new ones exist, *imports* that
until they begin to join. The phases from there on are those of the line "start" that rank 0 prints; *first step* ends
with the line of the step. The launchers take turns.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mesh_megatron.config.cli import parse

ROOT = Path(__file__).parents[1]
SOURCES = (json.__file__, subprocess.__file__, threading.__file__)
LAUNCHERS = {"torchrun": ["-m", "torch.distributed.run"], "launch": [str(ROOT / "tools/launch.py")]}
PATIENCE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time lost when a rank is killed and all ranks are started again."""

    launchers: tuple[str, ...] = ("torchrun", "launch")
    """The programs that start the ranks: torchrun or launch (tools/launch.py)."""
    repetitions: int = 5
    """Kills of each; medians are reported."""
    ranks: int = 2
    """Processes, which share the batch (data parallelism)."""
    rank: int = 1
    """The rank that is killed."""
    hidden_size: int = 64
    """Width of the model."""
    layout: str = "1+2R2+1"
    """Layers of the model."""
    save_interval: int = 10
    """Steps between checkpoints."""
    steps_after_save: int = 5
    """The kill comes this many steps after a checkpoint."""
    json: Path | None = None
    """Where to write all times, with the settings."""


@dataclass
class Launch:
    """A running launcher: what its ranks print, with the Unix time of every line, and its rank processes."""

    process: subprocess.Popen[str]
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.time(), line.rstrip()))

    def ranks(self) -> list[psutil.Process]:
        """Return the living rank processes in the order of their ranks, which is that of their ids."""
        children = psutil.Process(self.process.pid).children()
        servers = [child for child in children if "forkserver" in command(child)]
        parents = [child for server in servers for child in server.children()] + children
        ranks = [one for one in parents if one not in servers and "resource_tracker" not in command(one)]
        return sorted(filter(alive, ranks), key=lambda process: process.pid)

    def wait(self, pattern: str, first: int) -> tuple[int, re.Match[str]]:
        """Return index and match of the first line from index ``first`` on that holds ``pattern``."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            for index in range(first, len(self.lines)):
                if match := re.search(pattern, self.lines[index][1]):
                    return index, match
            first = len(self.lines)
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        printed = "\n".join(line for _, line in self.lines[-40:])
        raise RuntimeError(f"no line with {pattern!r}; the launcher printed last:\n{printed}")


def main() -> int:
    args = parse(Arguments, description=__doc__)
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in args.launchers}
    kills: dict[str, list[dict[str, float]]] = {name: [] for name in args.launchers}
    for number in range(args.repetitions):
        for name in args.launchers:
            with tempfile.TemporaryDirectory() as folder:
                started, killed = one_run(args, name, Path(folder))
            print(table({f"{name} {number + 1}": killed}), flush=True)
            starts[name].append(started)
            kills[name].append(killed)
    medians = {f"{name}, start": median(starts[name]) for name in args.launchers}
    medians |= {f"{name}, kill": median(kills[name]) for name in args.launchers}
    print(table(medians))
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        record = {"settings": settings, "starts": starts, "kills": kills, "medians": medians}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def one_run(args: Arguments, launcher: str, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return the phases of a start, and those after a kill, in seconds."""
    began = time.time()
    launch = start(args, launcher, folder)
    try:
        phases, first, _ = one_start(launch, 0, began)
        return phases | {"total": launch.lines[first][0] - began}, one_kill(launch, args, first)
    finally:
        end(launch)


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each number."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def start(args: Arguments, launcher: str, folder: Path) -> Launch:
    """Start ``launcher`` with a model and data that are made for it in ``folder``."""
    text = folder / "text.txt"
    text.write_text("\n\n".join(Path(source).read_text() for source in SOURCES), encoding="utf-8")
    flags = (
        f"--layout {args.layout} --recurrence mesh --hidden-size {args.hidden_size} --num-attention-heads 2 "
        f"--seq-length 64 --micro-batch-size 2 --global-batch-size {2 * args.ranks} --train-iters 20000 --lr 1e-3 "
        f"--tokenizer-type ByteLevelTokenizer --data-path {text} --split 90,10,0 --eval-iters 0 --num-workers 0 "
        f"--save {folder / 'save'} --save-interval {args.save_interval} --keep-last 2 --log-interval 1"
    )
    command = [sys.executable, *LAUNCHERS[launcher], "--standalone", "--nproc-per-node", str(args.ranks)]
    return Launch(
        subprocess.Popen(
            [*command, "--max-restarts", "1", str(ROOT / "pretrain_mesh.py"), *flags.split()],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )


def one_start(launch: Launch, since: int, began: float) -> tuple[dict[str, float], int, int]:
    """Return the phases of the next start in seconds, the line of its first step, and the iteration it continues from.

    Only lines from index ``since`` on count. Imports begin at the Unix time ``began``.
    """
    line, match = launch.wait(r"^start +\S+ s: (.*)", since)
    printed, _ = launch.lines[line]
    phases = {name: float(seconds) for seconds, name in (part.split(" ", 1) for part in match[1].split(", "))}
    phases["imports"] = printed - began - sum(value for name, value in phases.items() if name != "imports")
    first, step = launch.wait(r"^iteration +(\d+)/", line)
    return phases | {"first step": launch.lines[first][0] - printed}, first, int(step[1]) - 1


def one_kill(launch: Launch, args: Arguments, since: int) -> dict[str, float]:
    """Kill a rank some steps after a checkpoint, and return the phases until the next step is logged, in seconds.

    ``since`` is the line of a step before. "steps lost" were logged and must be computed again.
    """
    saved, match = launch.wait(r"^iteration +(\d+) \| checkpoint", since)
    launch.wait(rf"^iteration +{int(match[1]) + args.steps_after_save}/", saved)
    old = launch.ranks()
    killed = time.time()
    old[args.rank].kill()
    while any(map(alive, old)):
        time.sleep(0.005)
    ended, line = time.time(), len(launch.lines)
    last = max(int(m[1]) for _, text in launch.lines if (m := re.match(r"iteration +(\d+)/", text)))
    while not launch.ranks() and launch.process.poll() is None:
        time.sleep(0.005)
    began = time.time()
    phases, first, continued = one_start(launch, line, began)
    total = launch.lines[first][0] - killed
    return {"ranks end": ended - killed, "launcher": began - ended} | phases | {
        "total": total, "steps lost": last - continued,
    }  # fmt: skip


def alive(process: psutil.Process) -> bool:
    """Return whether a process runs; one that has ended and was not yet waited for does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command(process: psutil.Process) -> str:
    """Return a process's command line; "" once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def end(launch: Launch) -> None:
    """Kill the launcher, and with it its ranks."""
    ranks = launch.ranks() if launch.process.poll() is None else []
    launch.process.kill()
    launch.process.wait()
    psutil.wait_procs(ranks, timeout=30)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return one line for each row, with its numbers."""
    return "\n".join(
        f"{name:16}" + ", ".join(f"{value:.2f} {key}" for key, value in row.items()) for name, row in rows.items()
    )


if __name__ == "__main__":
    sys.exit(main())
