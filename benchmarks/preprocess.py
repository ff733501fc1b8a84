"""Preprocessing side by side, in one run: this project's tool and both of Megatron-LM's, on the same .jsonl, tokenizer
and cores, outputs compared byte for byte.

    python benchmarks/preprocess.py --megatron-lm PATH_TO_CHECKOUT --tokenizer-model tokenizer.json

Times are those of the complete command, from start to exit. The first use of a tokenizer, which proves for which text
gigatoken equals its own library, has its own row; all other runs find that proof. The corpus is made from the .py files
under ``--corpus``; rows of different sizes separate the time to start from the rate. Megatron-LM's files are run in
place, never copied. Its preprocess_data.py must write the same bytes; the result says whether preprocess_data_fast.py,
which gives all text to gigatoken, does so too.
"""

from __future__ import annotations

import filecmp
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[1]
# Megatron-LM's main branch imports typing.override, which Python 3.11 lacks.
SHIM = "import typing\nif not hasattr(typing, 'override'):\n    typing.override = lambda method: method\n"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time this project's preprocess_data.py against Megatron-LM's two tools."""

    megatron_lm: Path
    """Checkout of Megatron-LM with tools/preprocess_data.py and tools/preprocess_data_fast.py."""
    tokenizer_model: Path
    """A Hugging Face tokenizer.json."""
    corpus: Path = Path(os.__file__).parent
    """Folder whose .py files are the documents."""
    sizes_mb: tuple[int, ...] = (32, 120)
    """Sizes of the .jsonl inputs."""
    slow_up_to_mb: int = 32
    """Largest input that Megatron-LM's preprocess_data.py is run on (it takes minutes)."""
    workers: int = 2
    """Worker processes, and cores that all tools may use."""
    repeats: int = 3
    """Runs of each; the fastest counts. Megatron-LM's preprocess_data.py runs once."""
    output: Path = ROOT / "benchmarks" / "results" / "preprocess.json"
    """Results; a table lies beside them as .md."""


def main() -> None:
    from mesh_megatron.config.cli import parse

    args = parse(Arguments, description=__doc__)
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: args.workers]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shim").mkdir()
        (folder / "shim" / "sitecustomize.py").write_text(SHIM)
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_bytes(args.tokenizer_model.read_bytes())
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
        rows = [measure(args, folder, size) for size in args.sizes_mb]
    commit = subprocess.run(
        ["git", "-C", args.megatron_lm, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    result = {
        "machine": {
            "cores": args.workers,
            "python": platform.python_version(),
            "cpu": cpu_name(),
            "load_average": round(os.getloadavg()[1], 1),
        },
        "megatron_lm": commit.stdout.strip(),
        "tokenizer": args.tokenizer_model.name,
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    args.output.with_suffix(".md").write_text(text)
    print(text)


def measure(args: Arguments, folder: Path, size_mb: int) -> dict:
    """Seconds, rate and peak memory of each tool on an input of ``size_mb``."""
    source = folder / "corpus.jsonl"
    documents = write_corpus(args.corpus, source, size_mb << 20)
    model = folder / "tokenizer" / "tokenizer.json"
    common = ["--input", source, "--tokenizer-type", "HuggingFaceTokenizer", "--append-eod"]
    ours = [ROOT / "tools" / "preprocess_data.py", *common, "--tokenizer-model", model]
    ours += ["--workers", args.workers, "--overwrite", "--no-progress", "--output-prefix", folder / "ours"]
    theirs = [*common, "--tokenizer-model", model.parent]
    tools = args.megatron_lm / "tools"
    fast = [tools / "preprocess_data_fast.py", *theirs, "--use-gigatoken", "--output-prefix", folder / "fast"]
    slow = [tools / "preprocess_data.py", *theirs, "--workers", args.workers, "--output-prefix", folder / "slow"]
    megatron_path = f"{folder / 'shim'}{os.pathsep}{args.megatron_lm}"
    row: dict = {"megabytes": round(source.stat().st_size / 1e6, 1), "documents": documents}
    times: dict[str, list[Run]] = {"ours": [], "fast": []}
    if not (folder / "cache").exists():
        times["first"] = [run(ours, str(ROOT), folder / "cache")]
    for _ in range(args.repeats):  # in turns, so that a busy machine is busy for both
        times["ours"].append(run(ours, str(ROOT), folder / "cache"))
        times["fast"].append(run(fast, megatron_path, folder / "cache"))
    if size_mb <= args.slow_up_to_mb:
        times["slow"] = [run(slow, megatron_path, folder / "cache")]
    for name, runs in times.items():
        seconds, cpu = min(one.seconds for one in runs), min(one.cpu_seconds for one in runs)
        row[name] = {
            "seconds": round(seconds, 2),
            "all_seconds": [round(one.seconds, 2) for one in runs],
            "cpu_seconds": round(cpu, 2),
            "mb_per_second": round(row["megabytes"] / seconds, 1),
            "peak_memory_mb": round(max(one.peak_bytes for one in runs) / 1e6),
        }
        if name in ("fast", "slow"):
            row[name]["same_bytes"] = all(
                filecmp.cmp(folder / f"ours_text_document{suffix}", folder / f"{name}_text_document{suffix}", False)
                for suffix in (".bin", ".idx")
            )
        if name != "ours":
            row[f"{name}_to_ours"] = {
                "seconds": round(seconds / row["ours"]["seconds"], 2),
                "cpu_seconds": round(cpu / row["ours"]["cpu_seconds"], 2),
            }
    if not row.get("slow", {}).get("same_bytes", True):
        raise SystemExit("Megatron-LM's preprocess_data.py wrote other bytes than we did")
    return row


def write_corpus(corpus: Path, target: Path, size: int) -> int:
    """A .jsonl of different documents of about ``size`` bytes; the number of documents."""
    documents, written = 0, 0
    with open(target, "w", encoding="utf-8") as stream:
        for path in sorted(corpus.rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text:
                written += stream.write(json.dumps({"text": text, "name": path.name}) + "\n")
                documents += 1
            if written >= size:
                break
    return documents


class Run(NamedTuple):
    """One command from start to exit, its children included."""

    seconds: float
    cpu_seconds: float
    """User and system time: hardly depends on what else the machine does."""
    peak_bytes: float


def run(command: list, python_path: str, cache: Path) -> Run:
    """Run a tool and watch it; its output is shown if it fails."""
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    watched, peak = psutil.Process(process.pid), 0.0
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    text = b""
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            process.returncode = os.waitstatus_to_exitcode(status)
            break
        text += process.stdout.read() or b""
        try:
            family = [watched, *watched.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in family))
        except psutil.Error:
            pass
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    text += process.stdout.read() or b""
    if process.returncode:
        raise SystemExit(f"{command[0]} failed:\n{text.decode(errors='replace')}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def table(result: dict) -> str:
    machine = result["machine"]
    lines = [
        "# Preprocessing against Megatron-LM",
        "",
        f"{machine['cores']} cores of {machine['cpu']}, Python {machine['python']}, load average "
        f"{machine['load_average']} during the run; Megatron-LM {result['megatron_lm']}; {result['tokenizer']}. "
        "Seconds of the whole command, the fastest of several taken in turns; on a busy machine compare CPU seconds.",
        "",
        "| input | tool | seconds | CPU seconds | MB/s | peak memory | times our seconds | times our CPU seconds "
        "| same bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = {
        "ours": "`tools/preprocess_data.py`",
        "first": "the same, first use of a tokenizer",
        "fast": "Megatron-LM `preprocess_data_fast.py`",
        "slow": "Megatron-LM `preprocess_data.py`",
    }
    for row in result["rows"]:
        for name in ("ours", "first", "fast", "slow"):
            if name in row:
                one, ratio = row[name], row.get(f"{name}_to_ours", {})
                lines.append(
                    f"| {row['megabytes']} MB, {row['documents']:,} documents | {names[name]} | {one['seconds']} | "
                    f"{one['cpu_seconds']} | {one['mb_per_second']} | {one['peak_memory_mb']} MB | "
                    f"{ratio.get('seconds', '')} | {ratio.get('cpu_seconds', '')} | "
                    f"{ {True: 'yes', False: 'no'}.get(one.get('same_bytes'), '') } |"
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
