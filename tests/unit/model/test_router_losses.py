"""Losses of routers against their definitions under plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
from test_mesh_model import VOCABULARY, build, shake

from mesh_megatron.config.run import RunConfig
from mesh_megatron.model.memory_op import RouterWeights, route, router_input
from mesh_megatron.model.router_losses import Coefficients, RouterLosses, with_losses

SLOTS = 5


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(RouterLosses, "weight", 1.0)
    RouterLosses.take()
    yield
    RouterLosses.take()


def definitions(state, router):
    """(z-loss, entropy loss) as the module's table has them."""
    logits = (router_input(state, router.input) @ router.weight.T + router.bias).unflatten(-1, (2, SLOTS))
    if router.gate == "softmax":
        p = logits.softmax(-1)
        return logits.exp().sum(-1).log().square().mean(), (math.log(SLOTS) + (p * p.log()).sum(-1)).mean()
    p = logits.sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    return logits.square().mean(), (math.log(2) - entropy).mean()


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("read", ["state", "rmsnorm"])
@pytest.mark.parametrize("coefficients", [Coefficients(0.3, 0.0), Coefficients(0.0, 0.7), Coefficients(0.3, 0.7)])
def test_the_gradient_is_that_of_the_definition(gate, read, coefficients, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, 3, 6), (2 * SLOTS, 6), (2 * SLOTS,))
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    state, router = leaves[0], RouterWeights(leaves[1], leaves[2], read, gate)
    cotangent = torch.randn(4, 3, 2 * SLOTS, generator=generator, dtype=torch.float64)
    z, entropy = definitions(state, router)
    total = (route(state, *router) * cotangent).sum() + 8 * 0.25 * (coefficients.z * z + coefficients.entropy * entropy)
    expected = torch.autograd.grad(total, leaves)
    monkeypatch.setattr(RouterLosses, "weight", 8.0)
    routing = with_losses(route(state, *router), state, router, coefficients, share=0.25)
    torch.testing.assert_close(list(torch.autograd.grad((routing * cotangent).sum(), leaves)), list(expected))
    assert RouterLosses.take() == pytest.approx((z.item(), entropy.item(), 1))
    assert RouterLosses.take() == (0.0, 0.0, 0)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_saturated_gates_have_finite_gradients(gate):
    state = torch.ones(2, 1, 4, requires_grad=True)
    router = RouterWeights(
        torch.full((2 * SLOTS, 4), 50.0) * torch.arange(2.0 * SLOTS)[:, None], torch.zeros(10), gate=gate
    )
    routing = with_losses(route(state, *router), state, router, Coefficients(1.0, 1.0), share=1.0)
    (gradient,) = torch.autograd.grad(routing.sum(), state)
    assert torch.isfinite(gradient).all()


def test_without_gradients_nothing_is_computed():
    state, router = torch.ones(2, 1, 4), RouterWeights(torch.ones(10, 4), torch.zeros(10))
    with torch.no_grad():
        routing = route(state, *router)
        assert with_losses(routing, state, router, Coefficients(1.0, 1.0), 1.0) is routing
    assert with_losses(routing, state, router, Coefficients(0.0, 0.0), 1.0) is routing
    assert RouterLosses.sums == []


@pytest.mark.usefixtures("one_rank")
def test_the_entropy_loss_evens_the_weights_out():
    """Trained on the losses of the routers alone (the model's own loss times zero)."""
    model = build(recurrence="mesh", router_entropy_loss=1.0)
    shake(model)
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(model.recurrence.parameters(), lr=0.02)
    seen = []
    for _ in range(40):
        optimizer.zero_grad()
        (0 * model(tokens, None, tokens).sum()).backward()
        optimizer.step()
        seen.append(RouterLosses.take()[1])
    assert seen[-1] < 0.3 * seen[0]


@pytest.mark.parametrize("flag", ["--router-z-loss", "--router-entropy-loss"])
def test_they_are_refused_where_there_are_no_gates(flag):
    from mesh_megatron.config import cli

    flags = ["--recurrence", "dynamic", flag, "0.1", "--dry-run"]
    with pytest.raises(ValueError, match=f"{flag} 0.1 with --recurrence dynamic: only mesh"):
        cli.parse(RunConfig, flags).validate(1)
    cli.parse(RunConfig, [*flags, "--recurrence", "mesh"]).validate(1)
