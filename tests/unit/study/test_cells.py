"""Which cells are trained, again or not at all; with a trainer of one line in place of the real one."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.study import run
from benchmarks.study.corpus import Tokens
from benchmarks.study.grid import Cell

TOKENS = Tokens(Path("tokens"), Path("tokenizer.model"))
FINISH = """
import json, sys
with open(sys.argv[1] + "/metrics.jsonl", "a") as file:
    print(json.dumps({"iteration": 4, "lm loss validation": 2.5}), file=file)
"""
FAIL = "print('out of luck'); raise SystemExit(3)"
SLEEP = """
import signal, sys, time
def stop(number, frame): open(sys.argv[1] + "/stopped", "w").close(); sys.exit(0)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1] + "/started", "w").close()
time.sleep(60)
"""


def cell(scheme: str, **training: object) -> Cell:
    return Cell("d16", scheme, 1, {"model": {"recurrence": scheme}, "training": {"train_iters": 4, **training}})


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A trainer on two places whose cells run the program of their scheme, counted in ``started``."""
    started: list[str] = []

    def command(folder: Path, cell: Cell, tokens: Tokens) -> list[str]:
        started.append(cell.scheme)
        program = {"fail": FAIL, "sleep": SLEEP}.get(cell.scheme, FINISH)
        return [sys.executable, "-c", program, str(folder / cell.name)]

    monkeypatch.setattr(run, "command", command)
    one = run.Trainer(tmp_path, TOKENS, [{"PLACE": "0"}, {"PLACE": "1"}])
    one.started = started
    return one


def test_done_cells_are_not_trained_again(trainer, tmp_path):
    assert trainer.train([cell("base")]) == []
    assert trainer.train([cell("base"), cell("mesh")]) == []
    assert trainer.started == ["base", "mesh"]
    assert run.final_loss(tmp_path, cell("mesh")) == 2.5


def test_a_cell_without_its_last_evaluation_goes_on(trainer, tmp_path):
    run.write_settings(tmp_path, cell("base"))
    (tmp_path / "d16/base/seed1/metrics.jsonl").write_text('{"iteration": 2, "lm loss validation": 3.0}\n{"iterat')
    assert run.validation_curve(tmp_path, cell("base")) == [(2, 3.0)]
    assert run.final_loss(tmp_path, cell("base")) is None
    trainer.train([cell("base")])
    assert trainer.started == ["base"]


def test_a_failing_cell_stops_no_other(trainer, tmp_path):
    failed = trainer.train([cell("fail"), cell("base"), cell("mesh")])
    assert [one.scheme for one in failed] == ["fail"]
    assert run.final_loss(tmp_path, cell("base")) == run.final_loss(tmp_path, cell("mesh")) == 2.5
    assert "out of luck" in (tmp_path / "d16/fail/seed1/log.txt").read_text()


def test_other_settings_in_the_same_folder_are_refused(trainer, tmp_path):
    trainer.train([cell("base")])
    with pytest.raises(ValueError, match="cell.yaml has other settings than the grid"):
        trainer.train([cell("base", lr=1.0)])


def test_an_interrupt_stops_running_cells_and_starts_no_more(trainer, tmp_path):
    def interrupt() -> None:
        while not (tmp_path / "d16/sleep/seed1/started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    trainer.places = trainer.places[:1]
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        trainer.train([cell("sleep"), cell("base")])
    thread.join()
    assert (tmp_path / "d16/sleep/seed1/stopped").exists() and trainer.started == ["sleep"]


def test_one_study_a_folder(trainer, tmp_path):
    with run._locked(tmp_path), pytest.raises(ValueError, match="another study, or a cell of a killed one"):
        trainer.train([cell("base")])
    assert trainer.started == []


def test_a_place_is_a_gpu_or_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run.places(None, gpus=0) == [{"OMP_NUM_THREADS": "1"}] * 8
    assert run.places(2, gpus=0) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert [place["CUDA_VISIBLE_DEVICES"] for place in run.places(None, gpus=2)] == ["0", "1"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in run.places(3, gpus=2)] == ["0", "1", "0"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run.places(2, gpus=0) == [{"OMP_NUM_THREADS": "3"}] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in run.places(3, gpus=2)] == ["4", "6", "4"]
