"""Conversion of a run's settings into the command line that starts it."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from mesh_megatron.config.run import RunConfig


def launcher(world_size: int, gpus_per_node: int) -> list[str]:
    """Return the words before pretrain_mesh.py. They are the same on each node; HEAD stands for one node's name.

    Raise ``ValueError`` if ``world_size`` exceeds one node and does not fill nodes.
    """
    if world_size == 1:
        return ["python"]
    if world_size <= gpus_per_node:
        return ["torchrun", "--nproc-per-node", str(world_size)]
    if world_size % gpus_per_node:
        raise ValueError(f"--world-size {world_size} does not fill nodes of --gpus-per-node {gpus_per_node}")
    nodes = ["--nnodes", str(world_size // gpus_per_node), "--nproc-per-node", str(gpus_per_node)]
    return ["torchrun", *nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", "HEAD:29500"]


def flags(run: RunConfig, base: RunConfig) -> list[str]:
    """Return the flags that turn ``base``, which ``of_files_and_presets`` give, into ``run``."""
    words = of_files_and_presets(run)
    for group in (field.name for field in dataclasses.fields(RunConfig)):
        ours, theirs = getattr(run, group), getattr(base, group)
        if dataclasses.is_dataclass(ours):
            for field in dataclasses.fields(ours):
                value = getattr(ours, field.name)
                if value != getattr(theirs, field.name):
                    words += _flag(field.name, value)
    return words


def of_files_and_presets(run: RunConfig) -> list[str]:
    """Return the flags of ``run`` that stand for several settings."""
    words: list[str] = []
    for name in ("config", "preset", "router_preset"):
        if getattr(run, name) is not None:
            words += _flag(name, getattr(run, name))
    return words


def command_line(run: RunConfig, base: RunConfig, world_size: int, gpus_per_node: int) -> str:
    """Return the complete command; PREFIX and FOLDER stand for data and --save where ``run`` does not set them."""
    words = [*launcher(world_size, gpus_per_node), "pretrain_mesh.py", *flags(run, base)]
    if not (run.data.data_path or run.data.train_data_path or run.data.mock_data):
        words += ["--train-data-path" if run.data.per_split else "--data-path", "PREFIX"]
    if run.checkpoint.save is None:
        words += ["--save", "FOLDER"]
    return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{flag}", *map(str, values)]
