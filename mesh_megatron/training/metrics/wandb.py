"""The log in Weights & Biases. It never ends a run: after its first error training continues without it."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mesh_megatron.config.cli import to_dict
from mesh_megatron.config.run import RunConfig
from mesh_megatron.util.atomic_files import write_atomically

logger = logging.getLogger(__name__)


def check_wandb(project: str | None) -> None:
    """Raise ``ValueError`` if --wandb-project is given but Weights & Biases is not installed."""
    if project is not None and find_spec("wandb") is None:
        raise ValueError(f"--wandb-project {project} needs Weights & Biases: pip install wandb, or drop the flag")


class WandbLog:
    """The run in Weights & Biases that belongs to ``--save``; created once and resumed at every restart."""

    def __init__(self, run: RunConfig) -> None:
        self._project = run.logging.wandb_project
        self._run: Any = None
        self._attempt(self._start, run)

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of ``iteration``, which may be lower than the last one that was logged."""
        if self._run is not None:
            self._attempt(self._run.log, {"iteration": iteration, **numbers})

    def finish(self) -> None:
        """Send all remaining records, without a time limit."""
        if self._run is not None:
            self._attempt(self._run.finish)

    def _start(self, run: RunConfig) -> None:
        import wandb

        folder = run.logging.wandb_save_dir
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self._project,
            entity=run.logging.wandb_entity,
            name=run.logging.wandb_exp_name,
            dir=folder,
            config=json.loads(json.dumps(to_dict(run), default=str)),
            id=_run_id(run.checkpoint.save),
            resume="allow",
        )
        # Weights & Biases drops records whose step decreases, as iterations do after a restart; plot over a metric.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def _attempt(self, call: Callable[..., object], *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # any error
            self._run = None
            logger.warning(f"--wandb-project {self._project}: no more records there: {type(error).__name__}: {error}")


def _run_id(save: Path | None) -> str | None:
    if save is None:
        return None
    known = save / "wandb_id.txt"
    if not known.exists():
        write_atomically(known, secrets.token_hex(8))
    return known.read_text(encoding="utf-8")
