"""Calls to Weights & Biases (a stub here); its errors never end a run."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path

import pytest

from mesh_megatron.checkpoint.metrics_file import read_metrics
from mesh_megatron.config.checkpoint import CheckpointConfig
from mesh_megatron.config.logging import LoggingConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.training.metrics.wandb import check_wandb
from mesh_megatron.training.metrics.writer import MetricsWriter
from mesh_megatron.util.terminal_log import log_to_terminal


class Stub(types.ModuleType):
    """A module that records its calls and raises in those that ``broken`` names."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.calls: list[tuple] = []
        self.broken = ""

    def __getattr__(self, name: str):
        def call(*args, **settings):
            self.calls.append((name, args, settings))
            if name == self.broken:
                raise ConnectionError("no route to host")
            return self

        return call

    def of(self, name: str) -> list[tuple]:
        return [(args, settings) for called, args, settings in self.calls if called == name]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def log(save: Path, *iterations: int) -> None:
    run = RunConfig(checkpoint=CheckpointConfig(save=save), logging=LoggingConfig(wandb_project="loops"))
    writer = MetricsWriter(run)
    writer.open(iterations[0] - 1)
    for iteration in iterations:
        writer.write({"iteration": iteration, "lm loss": 5.0})
    writer.close()


def test_a_restart_goes_back_in_the_same_run(wandb: Stub, tmp_path: Path) -> None:
    log(tmp_path, 1, 2, 3)
    log(tmp_path, 2, 3)
    (_, first), (_, second) = wandb.of("init")
    assert first["id"] == second["id"] and len(first["id"]) == 16 and first["resume"] == second["resume"] == "allow"
    assert first["project"] == "loops" and first["config"]["checkpoint"]["save"] == str(tmp_path)
    assert (("*",), {"step_metric": "iteration"}) in wandb.of("define_metric")
    assert wandb.of("log") == [(({"iteration": i, "lm loss": 5.0},), {}) for i in (1, 2, 3, 2, 3)]
    assert len(wandb.of("finish")) == 2


def test_account_and_folder(wandb: Stub, tmp_path: Path) -> None:
    settings = LoggingConfig(wandb_project="loops", wandb_entity="lab", wandb_save_dir=tmp_path / "new" / "folder")
    writer = MetricsWriter(RunConfig(logging=settings))
    writer.open(0)
    writer.close()
    [(_, given)] = wandb.of("init")
    assert (given["entity"], given["dir"]) == ("lab", tmp_path / "new" / "folder") and given["dir"].is_dir()


@pytest.mark.parametrize("broken", ["init", "define_metric", "log", "finish"])
def test_an_error_is_reported_once_and_ends_nothing(
    wandb: Stub, tmp_path: Path, capsys: pytest.CaptureFixture, broken: str
) -> None:
    wandb.broken = broken
    with log_to_terminal(0):
        log(tmp_path, 1, 2, 3)
    assert capsys.readouterr().err == (
        "WARNING: --wandb-project loops: no more records there: ConnectionError: no route to host\n"
    )
    assert len(wandb.of(broken)) == 1
    assert [record["iteration"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_refused_where_it_is_not_installed(wandb: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    check_wandb("loops")
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(None)
    with pytest.raises(ValueError, match="--wandb-project loops needs Weights & Biases: pip install wandb"):
        check_wandb("loops")
