"""Callbacks at a step that ``--iterations-to-skip`` passes over, which computes nothing."""

from types import SimpleNamespace

import torch

from mesh_megatron.config.logging import LoggingConfig
from mesh_megatron.training.callbacks import mesh_probes, step_times, stragglers
from mesh_megatron.training.step import PASSED_OVER, StepResult
from mesh_megatron.training.trainer import Callback, Trainer


class Records:
    def __init__(self):
        self.written = []

    def write(self, record):
        self.written.append(record)


class Scheme:
    """A scheme without parameters, whose methods a probe replaces for the time of a step."""

    def enter(self, cycle, state, memory):
        return memory

    def leave(self, cycle, output, memory):
        return output, memory


def step(callback: Callback, trainer: Trainer, result: StepResult = PASSED_OVER) -> None:
    callback.before_step(trainer)
    trainer.state.iteration += 1
    callback.after_step(trainer, result)


def trainer_of(**parts: object) -> Trainer:
    return SimpleNamespace(state=SimpleNamespace(iteration=0), done=False, **parts)


def test_a_probe_has_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(mesh_probes, "on_first_stage", lambda: True)
    monkeypatch.setattr(mesh_probes, "sequence_groups", lambda config: [])
    records, scheme = Records(), Scheme()
    trainer = trainer_of(model=SimpleNamespace(modules=[SimpleNamespace(recurrence=scheme)], config=None))
    probes = mesh_probes.MeshProbes(records, 1)
    step(probes, trainer)
    assert records.written == [] and vars(scheme) == {}
    probes.before_step(trainer)  # the next step is recorded again
    scheme.leave(0, torch.ones(2, 1, 3), scheme.enter(0, torch.ones(2, 1, 3), {}))
    assert set(probes._watch.squares) == {("state", 0), ("output", 0), ("change", 0), ("state", 1)}


def test_it_is_no_usual_step_time(monkeypatch):
    """Neither is it the first step, which compiles, nor one that makes others look slow."""
    monkeypatch.setattr(stragglers, "_SECONDS", -1.0)
    callback = stragglers.Stragglers(factor=2)
    trainer = trainer_of(run=SimpleNamespace(logging=SimpleNamespace(log_interval=100)))
    for _ in range(20):
        step(callback, trainer)
    assert callback._first and not callback._steps


def test_it_does_not_count_in_mean_times_of_parts(monkeypatch):
    gathered = []
    monkeypatch.setattr(step_times, "gather", lambda mine: gathered.append(mine) or [mine])
    callback = step_times.StepTimes(None, LoggingConfig(log_interval=4, timing_log_level=1))
    monkeypatch.setattr(callback._timers, "take", lambda: {"optimizer": 6.0})
    trainer = trainer_of()
    for _ in range(4):
        step(callback, trainer)
    assert gathered == []  # there are no times to show
    taken = SimpleNamespace(passed_over=False)
    for result in (taken, PASSED_OVER, taken, PASSED_OVER):
        step(callback, trainer, result)
    assert gathered == [{"optimizer": 3.0}]
