"""Settings of checkpoints: where, how often, and which to keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mesh_megatron.config.bounds import Count, check_bounds


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints: where they are written, kept and read."""

    save: Path | None = None
    """Folder for checkpoints and metrics.jsonl. A run that is started again with it continues from the newest one."""
    load: Path | None = None
    """Folder to continue from when --save holds no checkpoint. If it holds none either, training starts from random
    weights, with a warning."""
    exit_on_missing_checkpoint: bool = False
    """Refuse to start if --load holds no checkpoint."""
    save_interval: Count | None = None
    """Steps between checkpoints; default only at the end."""
    keep_last: Count | None = None
    """Checkpoints to keep, newest first; default all."""
    save_retain_interval: Count | None = None
    """With --keep-last, never delete checkpoints whose iteration is a multiple of this."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on."""
    ckpt_step: Count | None = None
    """Iteration to load instead of the newest. Without --load it is taken from --save, until the run has saved a newer
    one; tools/checkpoint.py rollback goes back permanently."""
    verify_checkpoint: Literal["size", "hash"] = "size"
    """Before loading, compare each file's size, or its size and hash (reads every file), with the manifest."""
    finetune: bool = False
    """Take only the weights from --load, which must hold a checkpoint: start at iteration 0 with a new optimizer and
    data order."""
    no_save_optim: bool = False
    """Leave optimizer state out of checkpoints."""
    no_save_rng: bool = False
    """Leave random states out of checkpoints."""
    no_load_optim: bool = False
    """Do not load optimizer state: moments begin at zero again. Progress and learning rate continue."""
    no_load_rng: bool = False
    """Do not load random states."""

    def validate(self, writes: bool = True) -> None:
        """Raise ``ValueError`` naming the flag, its value and the fix; only a run that ``writes`` needs a folder."""
        check_bounds(self)
        if writes and self.save_interval is not None and self.save is None:
            raise ValueError(f"--save-interval {self.save_interval} needs --save, a folder to write to")
        if self.exit_on_missing_checkpoint and self.load is None:
            raise ValueError("--exit-on-missing-checkpoint needs --load, the folder that must hold a checkpoint")
        retain = self.save_retain_interval
        if retain is None:
            return
        if self.keep_last is None:
            raise ValueError(f"--save-retain-interval {retain} needs --keep-last; without it all checkpoints are kept")
        if self.save_interval is not None and retain % self.save_interval:
            raise ValueError(
                f"--save-retain-interval {retain}: must be a multiple of --save-interval {self.save_interval}: "
                f"use {self.save_interval * (retain // self.save_interval + 1)}"
            )
