"""Ranks with Transformer Engine on the CPU, and where its Python is found."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import pytest
from packaging.version import Version
from rank_pool import RankPool

from engine.install import FOLDER, unpack
from mesh_megatron.config.run import RunConfig

Result = TypeVar("Result")
SOURCE = "TRANSFORMER_ENGINE"


def find_python(target: Path) -> Path | None:
    """Return a folder with Transformer Engine's Python: of $TRANSFORMER_ENGINE, installed, or from ``make env``.

    A wheel is unpacked into ``target``.
    """
    if SOURCE in os.environ:
        return unpack(Path(os.environ[SOURCE]), target)
    try:
        return Path(str(metadata.distribution("transformer-engine").locate_file("")))
    except metadata.PackageNotFoundError:
        wheels = Path(sys.prefix, "wheels")
        return unpack(wheels, target) if any(wheels.glob("transformer_engine-*.whl")) else None


def version_of(folder: Path) -> Version:
    """Return the version of the Transformer Engine in ``folder``; 0 if it does not say."""
    (info, *_) = [*folder.glob("transformer_engine-*.dist-info"), Path("transformer_engine-0.dist-info")]
    return Version(info.name.removeprefix("transformer_engine-").removesuffix(".dist-info"))


class EngineRanks:
    """Runs functions as ``RankPool`` does, in a pool of its own: processes decide once what ``megatron.core`` finds."""

    def __init__(self, folder: Path) -> None:
        self._version = version_of(folder)
        context = multiprocessing.get_context("spawn")
        self._host = ProcessPoolExecutor(1, context, initializer=_show, initargs=(str(folder),))

    def __enter__(self) -> EngineRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self._host.shutdown()

    def run(self, world_size: int, function: Callable[..., Result], *args: Any) -> list[Result]:
        """Run ``function`` on the ranks; skip the test for what ``extension.py`` only has for the version it is of."""
        runs = [arg for arg in args if isinstance(arg, RunConfig)]
        newer = self._version >= Version("2.12")
        if newer and any(run.fp8.fp8_format is not None or run.model.num_experts is not None for run in runs):
            pytest.skip(f"FP8 and experts of tests/engine are those of Transformer Engine 2.11, not {self._version}")
        return self._host.submit(_run, world_size, function, *args).result()


def _show(folder: str) -> None:
    os.environ[FOLDER] = folder


def _run(world_size: int, function: Callable[..., Result], *args: Any) -> list[Result]:
    with RankPool() as pool:
        return pool.run(world_size, function, *args)
