"""Ranks and steps that need more than others."""

import time
from collections import deque
from types import SimpleNamespace

import torch

from mesh_megatron.training.callbacks import stragglers as stragglers_module
from mesh_megatron.training.callbacks.stragglers import Seat, outlying, slow_step

GIB = 2**30


def lines_for(*ranks):
    """Lines for ranks, each of them (seconds, bytes, stage)."""
    loads = torch.tensor([rank[:2] for rank in ranks], dtype=torch.float64)
    return outlying(loads, [Seat(rank[2], "node7") for rank in ranks], factor=2)


def load(seconds=1.0, memory=10 * GIB, stage=0):
    return seconds, memory, stage


def test_a_slow_and_a_full_rank_are_named():
    (slow,) = lines_for(load(), load(seconds=2.5), load(), load())
    assert slow.startswith("rank 1 on node7 takes 2.50 s per step") and slow.endswith("others 1.00 s")
    (full,) = lines_for(load(), load(), load(memory=30 * GIB))
    assert full == "rank 2 on node7 has used 30.0 GiB of memory, others 10.0 GiB"


def test_one_of_two_ranks():
    assert lines_for(load(), load(seconds=2.1))[0].startswith("rank 1 on node7 takes 2.10 s")
    assert lines_for(load(seconds=2.1), load())[0].startswith("rank 0 on node7 takes 2.10 s")


def test_stages_are_not_compared_with_each_other():
    assert lines_for(load(), load(), load(3.0, stage=1), load(3.0, stage=1)) == []
    assert lines_for(load(), load(9.0, stage=1)) == []
    assert len(lines_for(load(3.0, stage=1), load(9.0, stage=1))) == 1


def test_thousands_of_ranks_take_no_time():
    seconds = []
    for _ in range(3):  # the first may import, and any may collect the garbage of other tests
        began = time.process_time()
        (line,) = lines_for(*[load()] * 4095, load(seconds=3.0))
        seconds.append(time.process_time() - began)
    assert line.startswith("rank 4095 ") and min(seconds) < 0.5


def test_small_differences_are_nobodys_trouble():
    assert lines_for(load(0.001, GIB // 8), load(0.004, GIB // 4)) == []


def test_a_slow_step():
    before = deque(maxlen=100)
    assert all(slow_step(step, 1.0, before, 2) is None for step in range(20))
    assert slow_step(21, 4.0, before, 2) == "step 21 took 4.00 s, 4.0 times the median of the last 21 of its size"
    assert slow_step(22, 1.5, before, 2) is None
    assert slow_step(2, 50.0, deque([1.0], maxlen=100), 2) is None  # the first steps compile


def test_forward_passes_of_an_evaluation_do_not_count(monkeypatch):
    monkeypatch.setattr(stragglers_module, "gather", lambda value: [value])
    monkeypatch.setattr(stragglers_module.parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)
    chunk = torch.nn.Linear(2, 2)
    callback = stragglers_module.Stragglers(factor=2)
    callback.start(SimpleNamespace(model=SimpleNamespace(chunks=[chunk])))
    with torch.no_grad():
        chunk(torch.zeros(1, 2))
    assert callback._watch.take() == 0
    chunk(torch.zeros(1, 2))
    assert callback._watch.take() > 0


def test_steps_are_compared_with_steps_of_as_much_work(monkeypatch, caplog):
    """Neither drawn loops nor a batch that grows make a step slow."""
    caplog.set_level("INFO", logger="mesh_megatron")
    now = [0.0]
    monkeypatch.setattr(stragglers_module.time, "perf_counter", lambda: now[0])
    trainer = SimpleNamespace(
        state=SimpleNamespace(iteration=0, consumed_samples=0), model=SimpleNamespace(loops=2),
        data=SimpleNamespace(train=None), run=SimpleNamespace(logging=SimpleNamespace(log_interval=10**6)),
    )  # fmt: skip
    callback = stragglers_module.Stragglers(factor=2)

    def step(seconds, loops, batch=8):
        callback.before_step(trainer)
        now[0] += seconds
        trainer.state.iteration += 1
        trainer.state.consumed_samples += batch
        trainer.model.loops = loops  # the step draws it
        callback.after_step(trainer, SimpleNamespace(passed_over=False))

    for number in range(120):
        step(9.0 if number % 3 == 0 else 1.0, loops=18 if number % 3 == 0 else 2)
    for _ in range(20):
        step(4.0, loops=2, batch=32)
    assert caplog.messages == []
    step(2.5, loops=2)
    assert len(caplog.messages) == 1 and "took 2.50 s, 2.5 times the median of the last 81 of its" in caplog.messages[0]
