"""Layers of Transformer Engine in a core that runs several times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesh_megatron.model.te_linear import AddsItsBias, AddsUpLoops, ReturnsItsSummand, with_mixins


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, weight: Tensor, overwrite: bool) -> Tensor:
        ctx.save_for_backward(state, weight)
        ctx.overwrite, ctx.weight = overwrite, weight
        return state @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        state, weight = ctx.saved_tensors
        product = gradient.T @ state
        ctx.weight.main_grad.copy_(product) if ctx.overwrite else ctx.weight.main_grad.add_(product)
        return gradient @ weight, None, None


class StandIn(torch.nn.Module):
    """A replacement of Transformer Engine's linear layer in Megatron-Core: its first call of a micro-batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(4) + 0.1 * torch.ones(4, 4))
        self.weight.main_grad = torch.zeros(4, 4)  # type: ignore[attr-defined]
        self.is_first_microbatch = True
        self._fp8_workspaces: dict[str, Tensor] = {}
        self.quantised = 0

    def forward(self, state: Tensor) -> Tensor:
        if self.is_first_microbatch or "weight" not in self._fp8_workspaces:
            self._fp8_workspaces["weight"] = self.weight.detach().clone()
            self.quantised += 1
        first, self.is_first_microbatch = self.is_first_microbatch, False
        return _Product.apply(state, self.weight, first)


def run_core(layer: Any) -> Tensor:
    state = torch.linspace(-1, 1, 8).view(2, 4).requires_grad_()
    for _ in range(3):
        state = torch.tanh(layer(state))
    state.sum().backward()
    return layer.weight.main_grad.clone()


def autograds_sum() -> Tensor:
    weight, state = StandIn().weight, torch.linspace(-1, 1, 8).view(2, 4)
    for _ in range(3):
        state = torch.tanh(state @ weight.T)
    state.sum().backward()
    assert weight.grad is not None
    return weight.grad


def test_all_loops_add_to_the_gradient() -> None:
    layer = with_mixins(StandIn, AddsUpLoops)()
    torch.testing.assert_close(run_core(layer), autograds_sum())
    layer.is_first_microbatch = True  # a new step
    layer.weight.main_grad.zero_()
    torch.testing.assert_close(run_core(layer), autograds_sum())
    assert layer.quantised == 2, "once a step"


def test_the_layer_as_it_is_would_keep_one_loop() -> None:
    """The stand-in can tell."""
    assert (run_core(StandIn()) - autograds_sum()).norm() > 0.1 * autograds_sum().norm()


def test_quantised_weights_follow_the_step() -> None:
    layer = with_mixins(StandIn, AddsUpLoops)()
    run_core(layer)
    with torch.no_grad():
        layer.weight += 1
    layer.is_first_microbatch = True
    run_core(layer)
    torch.testing.assert_close(layer._fp8_workspaces["weight"], layer.weight.detach())


def test_the_product_adds_the_bias() -> None:
    class Asked:
        def __init__(self, width: int, *, bias: bool, skip_bias_add: bool) -> None:
            self.asked = (width, bias, skip_bias_add)

    layer = with_mixins(Asked, AddsItsBias)(8, bias=True, skip_bias_add=True)
    assert layer.asked == (8, True, False) and isinstance(layer, Asked)


def test_the_caller_sums_over_ranks() -> None:
    class Row:
        def __init__(self, sequence_parallel: bool) -> None:
            self.parallel_mode, self.sequence_parallel = "row", sequence_parallel
            self.cut = self.parallel_mode == "row"

    layer = with_mixins(Row, ReturnsItsSummand)(sequence_parallel=True)
    assert layer.cut and layer.returns_summand
    assert layer.parallel_mode is None and not layer.sequence_parallel


def test_one_class_for_each_layer() -> None:
    assert (
        with_mixins(StandIn, AddsUpLoops) is with_mixins(StandIn, AddsUpLoops)
        and with_mixins(StandIn, AddsUpLoops).__name__ == "StandIn"
    )
