"""Logging settings: terminal, metrics, TensorBoard, Weights & Biases and profiles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mesh_megatron.config.bounds import Bounds, Count, check_bounds


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging: terminal, metrics.jsonl, TensorBoard, Weights & Biases, profiles."""

    logging_level: Annotated[int, Bounds(least=0)] = 20
    """Least level of the messages on the terminal, as Python numbers them: 10 debug, 20 info, 30 warning, 40 error."""
    log_interval: Count = 10
    """Steps between log lines, which show means over these steps; metrics.jsonl records every step."""
    outlier_factor: Annotated[float, Bounds(least=0)] = 2.0
    """Report ranks that take this many times the time or memory of the other ranks of their pipeline stage, and steps
    that are this many times slower than usual; 0 reports none."""
    probe_interval: Count | None = None
    """Steps between records of router weights, state norms and update magnitudes; default: never."""
    log_params_norm: bool = False
    """Record the norm of all weights after each step."""
    log_num_zeros_in_grad: bool = False
    """Record the number of zeros in each step's gradients."""
    log_validation_ppl_to_tensorboard: bool = False
    """Record the perplexity of each evaluation beside its loss."""
    timing_log_level: Literal[0, 1, 2] = 0
    """Time the parts of steps and print them in the log lines' interval: 0 only complete steps, as always; 1 the parts
    that come a few times per step (forward and backward, gradient reduction, optimizer); 2 also those of every
    micro-batch (reading data, forward, backward, sends and receives)."""
    timing_log_option: Literal["max", "minmax", "all"] = "minmax"
    """Times to print of each part: the longest of all ranks, the shortest and longest, or every rank's."""
    log_timers_to_tensorboard: bool = False
    """Also send these times, and those of evaluations and of waiting for checkpoints, to TensorBoard and Weights &
    Biases."""
    tensorboard_dir: Path | None = None
    """Folder for TensorBoard; default SAVE/tensorboard."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""
    wandb_exp_name: str | None = None
    """Name of the run in Weights & Biases."""
    wandb_entity: str | None = None
    """User or team that the project belongs to; default the account that is logged in."""
    wandb_save_dir: Path | None = None
    """Folder for the files of Weights & Biases; default WANDB_DIR of the environment, or the current folder."""
    profile: bool = False
    """Write a torch profiler trace of --profile-step-start to --profile-step-end."""
    profile_step_start: Annotated[int, Bounds(least=0)] = 10
    """First profiled step."""
    profile_step_end: Count = 12
    """First step after the profiled ones."""
    profile_ranks: tuple[Annotated[int, Bounds(least=0)], ...] = (0,)
    """Ranks to profile."""

    def validate(self) -> None:
        """Raise ``ValueError`` naming the flag, its value and the fix."""
        check_bounds(self)
        if self.outlier_factor and self.outlier_factor <= 1:
            raise ValueError(f"--outlier-factor {self.outlier_factor}: must be above 1, or 0 for none")
        if self.profile and self.profile_step_end <= self.profile_step_start:
            raise ValueError(
                f"--profile-step-end {self.profile_step_end}: must be above --profile-step-start "
                f"{self.profile_step_start}"
            )
