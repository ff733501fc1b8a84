"""Jobs for the cluster: the scripts of examples/slurm as users submit them, with a model of a moment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm_cluster import Cluster, until

from mesh_megatron.checkpoint.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
ITERATIONS = 100  # enough for what a test does to a run to come before its end
TINY = f"""\
model: {{layout: 1+1R2+1, hidden_size: 32, num_attention_heads: 2, seq_length: 32}}
training:
  {{train_iters: {ITERATIONS}, global_batch_size: 8, micro_batch_size: 2, lr: 3.0e-3, eval_interval: 50, eval_iters: 1}}
data: {{tokenizer_type: ByteLevelTokenizer, num_workers: 0, split: "60,20,20"}}
checkpoint: {{save_interval: 30}}
logging: {{log_interval: 1}}
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE")
_SPEEDS = ("iteration-time", "tokens per second", "TFLOP/s per rank")


@dataclass(frozen=True)
class Job:
    """One that was submitted; ``save`` is its --save folder, ``output`` what sbatch made of its output."""

    cluster: Cluster
    number: str
    save: Path
    output: Path

    def fields(self) -> dict[str, str]:
        """Return SLURM's present record of the job: JobState, Restarts, ExitCode and more."""
        text = self.cluster.run("scontrol", "show", "job", "--oneliner", self.number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for(self, *states: str) -> dict[str, str]:
        """Until it is in one of these states; its fields then."""
        until(lambda: self.fields()["JobState"] in states, f"{self} to be {states}", self.cluster)
        return self.fields()

    def wait_for_iteration(self, iteration: int) -> None:
        """Until it has logged this iteration."""

        def there() -> bool:
            state = self.fields()["JobState"]
            assert state not in ENDED, f"{state} before iteration {iteration}\n{self.said()[-5000:]}"
            return any(record["iteration"] >= iteration for record in self.metrics())

        until(there, f"iteration {iteration} of {self}", self.cluster)

    def wait_for_words(self, words: str) -> None:
        """Until its output holds them."""
        until(lambda: words in self.said(), f"{self} to say {words!r}", self.cluster)

    def finish(self) -> dict[str, str]:
        """Wait for its end, which must be a good one; its fields."""
        fields = self.wait_for(*ENDED)
        assert fields["JobState"] == "COMPLETED", f"{fields}\n{self.said()[-5000:]}"
        return fields

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def metrics(self) -> list[dict[str, Any]]:
        """Every record of metrics.jsonl so far, without its speeds."""
        path = self.save / "metrics.jsonl"
        records = read_metrics(path) if path.exists() else []
        return [{name: value for name, value in record.items() if name not in _SPEEDS} for record in records]

    def logs(self, restart: int) -> list[str]:
        """Files that hold the ranks' output since the given restart: node, local rank, stream."""
        folder = self.save / "logs" / self.fields()["JobId"] / f"restart_{restart}"
        files = sorted(folder.glob("*/*/attempt_0/*/*.log"))
        return [f"{path.parents[3].name} {path.parent.name} {path.name}" for path in files]


class Jobs:
    """Submits the scripts with a tiny model, without GPUs, and with folders of their own."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path) -> None:
        self.cluster, self.folder, self.data = cluster, folder, data
        self.config = folder / "tiny.yaml"
        self.config.write_text(TINY)

    def submit(
        self, script: str, name: str, options: Sequence[str] = (), flags: Sequence[str] = (), **variables: str
    ) -> Job:
        """``options`` are sbatch's, ``flags`` the trainer's, ``variables`` those that the scripts have at their top."""
        save, output = self.folder / name, self.folder / f"{name}.out"
        settings = {"CONFIG": self.config, "DATA": self.data, "SAVE": save, "PYTHON": sys.executable} | variables
        number = self.cluster.run(
            *("sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={output}", *options),
            *(f"examples/slurm/{script}", *flags),
            cwd=ROOT,
            environment={"OMP_NUM_THREADS": "1", **{name: str(value) for name, value in settings.items()}},
        )
        return Job(self.cluster, number.strip(), save, output)
