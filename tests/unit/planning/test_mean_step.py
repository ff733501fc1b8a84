"""Plans of runs whose steps differ in their number of loops."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh_megatron.config.loops import LoopsConfig
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.planning.flops import training_flops_per_token
from mesh_megatron.planning.hardware import Assumptions, Links, known_gpus
from mesh_megatron.planning.mean_step import MeanStep
from mesh_megatron.planning.plan import plan_run
from mesh_megatron.planning.step_time import StepModel

ROWS = 1024
RUN = RunConfig(
    model=ModelConfig(layout="2+4R3+2", padded_vocab_size=ROWS),
    loops=LoopsConfig(loops_sampling="uniform"),
    parallel=ParallelConfig(pipeline_model_parallel_size=2),
    training=TrainingConfig(train_iters=10, global_batch_size=8),
)
# The same model with other numbers of loops: with six slots, as many as three loops have by default.
FIXED = [
    replace(RUN, model=replace(RUN.model, layout=f"2+4R{k}+2", num_memory_slots=6), loops=LoopsConfig())
    for k in (1, 2, 3)
]


def test_operations_are_the_mean_and_memory_is_the_most():
    plan, plans = plan_run(RUN, 2), [plan_run(run, 2) for run in FIXED]
    expected = sum(training_flops_per_token(run.model, ROWS).total for run in FIXED) / 3
    assert plan.summary.flops_per_token.total == pytest.approx(expected, abs=6)
    assert plan.summary.mean_loops == pytest.approx(2)
    assert plan.memory == plans[-1].memory
    assert plan.summary.parameters == plans[-1].summary.parameters
    assert "loops" in plan.summary.to_text() and "2.00 on average" in plan.summary.to_text()


def test_a_step_takes_the_mean_of_its_times():
    links = Links(next(iter(known_gpus().values())), Assumptions(), 8)
    mean = MeanStep(RUN, ROWS, 2, 8, links)
    models = [StepModel(run, ROWS, 2, 8, links) for run in FIXED]
    times = [model.simulated() for model in models]
    assert mean.simulated().total == pytest.approx(sum(time.total for time in times) / 3)
    assert mean.least == pytest.approx(sum(model.least for model in models) / 3)
    assert sum(mean.simulated().by_reason().values()) == pytest.approx(mean.simulated().total)
    [one, *_] = times
    assert MeanStep(FIXED[0], ROWS, 2, 8, links).simulated() == one
