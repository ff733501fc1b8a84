"""Code that only a GPU without Transformer Engine and apex runs, here on a CPU: it gives the same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
from cases import BUCKETS, OVERLAP, PP2, SP, TP2, Case, run_config
from rank_pool import ROOT, RankPool
from test_layouts import assert_same_training
from test_moe import EP2, EXPERTS
from training_runs import TrainingRecord, train

from mesh_megatron.config.run import RunConfig
from mesh_megatron.parallel import build_model

pytestmark = pytest.mark.full

UNFUSED = [
    Case("mesh", 1),
    Case("tp2-sp", 2, f"{TP2} {SP}"),
    Case("pp2-dp2-distopt-overlap-buckets", 4, f"{PP2} {OVERLAP} {BUCKETS}"),
    Case("experts-ep2", 2, EP2, EXPERTS),
]

# On a CPU "aot_eager" stands in for the code generator, which wants a compiler: what torch traces is the same.
COMPILED = """
import collections, json, sys
import torch
from mesh_megatron.platform import cpu, device
calls, compile = collections.Counter(), torch.compile
def trace(function, **kwargs):
    traced = compile(function, backend="aot_eager", fullgraph=True)
    def call(*args, **kwargs):
        calls[function.__name__] += 1
        return traced(*args, **kwargs)
    return call
cpu._import_without_compiler = lambda: None
torch.compile = trace
device.prepare()
from cases import run_config
from training_runs import train
device.start_process_group()
losses = train(run_config(sys.argv[1])).losses
print(json.dumps([losses, calls]))
"""


def train_unfused(run: RunConfig) -> TrainingRecord:
    """Gradients of weights are products of their own, which autograd adds to the buffers."""
    with mock.patch.object(build_model, "has_gradient_extension", lambda: False):
        return train(run, with_gradients=True, evaluate=True)


@pytest.mark.parametrize("case", UNFUSED, ids=lambda case: case.name)
def test_unfused_gradients(case: Case, ranks: RankPool, one_process: Callable) -> None:
    expected = one_process(run_config(case.model))
    for actual in ranks.run(case.ranks, train_unfused, run_config(case.model, case.layout)):
        assert_same_training(actual, expected)


def test_compiled_helpers(one_process: Callable) -> None:
    """Of the functions that Megatron-Core compiles, layers call one: in the router of experts."""
    paths = [ROOT, ROOT / "tests", ROOT / "tests/distributed"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", COMPILED, EXPERTS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    losses, calls = json.loads(result.stdout.splitlines()[-1])
    assert list(calls) == ["_apply_expert_bias"]
    np.testing.assert_allclose(losses, one_process(run_config(EXPERTS)).losses, rtol=0, atol=1e-5)
