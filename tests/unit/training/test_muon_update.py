"""Muon's update against singular values, in which Newton-Schulz steps are polynomials."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mesh_megatron.config.muon import MuonConfig
from mesh_megatron.training.muon import _COEFFICIENTS, GROUP, Matrix, Muon, newton_schulz


class Alone:
    """The group of one process."""

    def size(self) -> int:
        return 1


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("coefficients, steps", [("quintic", 7), ("simple", 3), ("polar_express", 9)])
def test_steps_act_on_singular_values(shape: tuple[int, int], coefficients: str, steps: int) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(matrix)
    table = _COEFFICIENTS[coefficients]
    for step in range(steps):
        a, b, c = table[min(step, len(table) - 1)] if coefficients == "polar_express" else table[step % len(table)]
        values = a * values + b * values**3 + c * values**5
    found = newton_schulz(torch.tensor(matrix), steps, coefficients, torch.float64)
    np.testing.assert_allclose(found.numpy(), (left * values) @ right, atol=1e-9)


def test_zero_stays_zero() -> None:
    assert not newton_schulz(torch.zeros(3, 5), 5, "quintic").any()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mode, scale", [("spectral", 12), ("unit_rms_norm", 12 / 6), ("shape_scaling", 12 / 6)])
def test_update(nesterov: bool, mode: str, scale: float) -> None:
    """Two updates of a 12 x 6 matrix; and a vector beside it is AdamW's."""
    settings = MuonConfig(
        optimizer="muon", muon_momentum=0.8, muon_nesterov=nesterov, muon_scale_mode=mode, muon_extra_scale_factor=0.5
    )
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(12, 6)), torch.nn.Parameter(torch.randn(6))
    other = torch.nn.Parameter(vector.detach().clone())
    groups = [{"params": [matrix], "lr": 0.1, "weight_decay": 0.2, GROUP: True}, {"params": [vector], "lr": 0.01}]
    muon = Muon(torch.optim.AdamW(groups), {matrix: Matrix(0, Alone())}, settings)  # type: ignore[arg-type]
    adam = torch.optim.AdamW([other], lr=0.01)
    expected, momentum = matrix.detach().clone(), torch.zeros(12, 6)
    for _ in range(2):
        matrix.grad, vector.grad = torch.randn(12, 6), torch.randn(6)
        other.grad = vector.grad.clone()
        momentum = 0.8 * momentum + 0.2 * matrix.grad
        direction = 0.2 * matrix.grad + 0.8 * momentum if nesterov else momentum
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * 0.5 * scale**0.5 * newton_schulz(direction, 5, "quintic")
        muon.step()
        adam.step()
    torch.testing.assert_close(matrix.detach(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(vector, other, rtol=0, atol=0)
    torch.testing.assert_close(muon.state[matrix]["exp_avg"], momentum)
    assert "exp_avg_sq" not in muon.state[matrix]


def test_queries_keys_and_values_are_orthogonalised_as_three() -> None:
    """Two groups of heads with four rows of queries, two of keys, two of values each."""
    torch.manual_seed(0)
    gradient = torch.randn(16, 10)
    rows = gradient.view(2, 8, 10)
    three = [rows[:, start:stop].reshape(-1, 10) for start, stop in ((0, 4), (4, 6), (6, 8))]
    done = [newton_schulz(each, 5, "quintic") * 10**0.5 for each in three]
    expected = torch.cat([each.view(2, -1, 10) for each in done], dim=1).view(16, 10)
    weight = torch.nn.Parameter(torch.zeros(16, 10))
    weight.grad = gradient
    adam = torch.optim.AdamW([{"params": [weight], "lr": 1.0, "weight_decay": 0.0, GROUP: True}])
    Muon(adam, {weight: Matrix(0, Alone(), (4, 2, 2))}, MuonConfig(muon_momentum=0.0)).step()  # type: ignore[arg-type]
    torch.testing.assert_close(weight.detach(), -expected, rtol=0, atol=1e-6)
