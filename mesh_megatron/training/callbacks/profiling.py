"""Traces of chosen steps by torch's profiler, written to ``SAVE/profile/rankN.json``."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from megatron.core.utils import configure_nvtx_profiling

from mesh_megatron.config.run import RunConfig
from mesh_megatron.platform import device
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer
from mesh_megatron.util.terminal_log import EVERY_RANK

logger = logging.getLogger(__name__)


class Profiling(Callback):
    """Profiles the steps from ``--profile-step-start`` up to, not including, ``--profile-step-end``."""

    def __init__(self, run: RunConfig) -> None:
        self.settings = run.logging
        self.folder = (run.checkpoint.save or Path(".")) / "profile"
        self._profiler = torch.profiler.profile()
        self._running = False

    def start(self, trainer: Trainer) -> None:
        self._toggle(trainer.state.iteration)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self._toggle(trainer.state.iteration)

    def finish(self, trainer: Trainer) -> None:
        self._toggle(self.settings.profile_step_end)

    def _toggle(self, iteration: int) -> None:
        inside = self.settings.profile_step_start <= iteration + 1 < self.settings.profile_step_end
        if inside and not self._running:
            configure_nvtx_profiling(True)
            self._profiler.start()
            self._running = True
        elif self._running and not inside:
            self._profiler.stop()
            configure_nvtx_profiling(False)
            self._running = False
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"rank{device.rank()}.json"
            self._profiler.export_chrome_trace(str(path))
            logger.info(f"profile written to {path}", extra=EVERY_RANK)
