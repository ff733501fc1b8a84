"""Code that only a GPU without Transformer Engine and apex runs, here on a CPU: it gives the same losses."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from cases import golden_file, run_config
from rank_pool import ROOT, RankPool
from training_runs import TrainingRecord, train

from mesh_megatron.config.run import RunConfig
from mesh_megatron.parallel import build_model

pytestmark = pytest.mark.full

# On a CPU "aot_eager" stands in for the code generator, which wants a compiler: what torch traces is the same.
COMPILED = """
import torch
from mesh_megatron.platform import cpu, device
compiled, compile = [], torch.compile
def trace(function, **kwargs):
    compiled.append(function.__name__)
    return compile(function, backend="aot_eager", fullgraph=True)
cpu._import_without_compiler = lambda: None
torch.compile = trace
device.prepare()
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
assert "bias_dropout_add_fused_train" in compiled, compiled
x, bias, residual = (torch.randn(4, 2, 8, requires_grad=True) for _ in range(3))
ours, theirs = (get_bias_dropout_add(True, fused)((x, bias), residual, 0.0) for fused in (True, False))
gradients = [torch.autograd.grad(result.square().sum(), (x, bias, residual)) for result in (ours, theirs)]
assert torch.equal(ours, theirs) and all(map(torch.equal, *gradients))
"""


def train_unfused(run: RunConfig) -> TrainingRecord:
    """Gradients of weights are products of their own, which autograd adds to the buffers."""
    with mock.patch.object(build_model, "has_gradient_extension", lambda: False):
        return train(run)


def test_unfused_gradients(ranks: RankPool) -> None:
    (record,) = ranks.run(1, train_unfused, run_config())
    _, losses = np.loadtxt(golden_file("mesh")).T
    np.testing.assert_allclose(record.losses, losses, rtol=0, atol=1e-5)


def test_compiled_helpers() -> None:
    result = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
