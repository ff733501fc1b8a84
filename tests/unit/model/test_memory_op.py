"""Whole recurrences through ``next_state`` against the slots of the paper under plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mesh_megatron.model.memory import mix_slots
from mesh_megatron.model.memory_op import DeferredGradients, RouterWeights, next_state, resolve_memory_kernel, route

READ = {
    "state": lambda x: x,
    "normalized": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt(),
    "rmsnorm": lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(),
}
GATES = {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid}
FORMS = [(read, gate) for read in READ for gate in GATES]


class Recurrence:
    """Cycles 0..K with a small nonlinear block each; every tensor is a leaf whose gradient tests can read."""

    def __init__(
        self, loops: int, slots: int, width: int, dtype=torch.float64, form=("state", "softmax"), device="cpu"
    ) -> None:
        """``form`` is what the routers read and their gate."""
        generator = torch.Generator().manual_seed(loops * 100 + slots)
        router_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def leaf(*size, dtype=dtype, scale=1.0):
            drawn = torch.randn(*size, generator=generator, dtype=torch.float64) * scale
            return drawn.to(device, dtype).requires_grad_()

        scale = 0.1 if form[1] == "sigmoid" else 1.0  # weights that need not add up to one let states grow
        self.embedding = leaf(4, 3, width)
        self.blocks = [leaf(width) for _ in range(loops + 1)]
        self.routers = [
            RouterWeights(
                leaf(2 * slots, width, dtype=router_dtype, scale=scale), leaf(2 * slots, dtype=router_dtype), *form
            )
            for _ in range(loops + 1)
        ]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.embedding, *self.blocks, *(t for router in self.routers for t in router[:2])]

    def in_float64(self) -> Recurrence:
        """The same values, exactly, in a precision that makes no errors to speak of."""
        slots, form = self.routers[0].bias.numel() // 2, self.routers[0][2:]
        exact = Recurrence(len(self.blocks) - 1, slots, self.embedding.shape[-1], form=form)
        for leaf, value in zip(exact.leaves, self.leaves, strict=True):
            leaf.data = value.detach().double()
        return exact

    def block(self, cycle: int, state: Tensor) -> Tensor:
        return torch.tanh(state * self.blocks[cycle]) + state.roll(1, -1)

    def run(self, kernel: str) -> Tensor:
        """The last state, as the docstring of ``memory_op.py`` writes it."""
        deferred = DeferredGradients()
        state, sources = self.embedding, [self.embedding]
        routings = [route(state, *self.routers[0])]
        for cycle in range(len(self.blocks)):
            sources.append(self.block(cycle, state))
            router = self.routers[cycle + 1] if cycle + 1 < len(self.blocks) else None
            state, routing = next_state(sources, routings, router, deferred=deferred, kernel=kernel)
            routings.append(routing)
        return state

    def specification(self) -> Tensor:
        """mesh.md's cycles, word for word, with nothing of ours but the slots."""
        state, sources, writes = self.embedding, [self.embedding], []
        for cycle, router in enumerate(self.routers):
            seen = READ[router.input](state).to(router.weight.dtype)
            write, read = (seen @ router.weight.T + router.bias).chunk(2, -1)
            writes.append(GATES[router.gate](write))
            sources.append(self.block(cycle, state))
            state = mix_slots(sources, writes, GATES[router.gate](read))
        return state


def cotangent(state: Tensor) -> Tensor:
    return torch.randn(state.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(state)


def gradients(recurrence: Recurrence, state: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(state, recurrence.leaves, cotangent(state)))


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("kernel", ["torch", "slots"])
@pytest.mark.parametrize(("loops", "slots"), [(1, 1), (1, 5), (2, 5), (3, 4), (4, 8), (7, 16)])
def test_equals_the_specification(kernel, loops, slots, form):
    recurrence = Recurrence(loops, slots, width=6, form=form)
    state, expected = recurrence.run(kernel), recurrence.specification()
    torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)
    assert_all_close(gradients(recurrence, state), gradients(recurrence, expected), 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_the_truth_as_plain_autograd(dtype):
    low = Recurrence(3, 6, 32, dtype)
    exact = low.in_float64()
    truth = gradients(exact, exact.specification())
    ours, plain = gradients(low, low.run("torch")), gradients(low, low.specification())
    for one, other, true in zip(ours, plain, truth, strict=True):
        error, plain_error = ((grad.double() - true).norm() / true.norm() for grad in (one, other))
        assert error <= 1.2 * plain_error + torch.finfo(dtype).eps


def test_backward_twice_gives_the_same_again():
    recurrence = Recurrence(3, 6, 5)
    state = recurrence.run("torch")
    first = torch.autograd.grad(state, recurrence.leaves, cotangent(state), retain_graph=True)
    second = torch.autograd.grad(state, recurrence.leaves, cotangent(state))
    assert_all_close(list(second), list(first), 0)


@pytest.mark.parametrize("loops", [1, 2, 3])
def test_a_graph_of_its_own_for_every_cycle(loops):
    """As a pipeline runs it: later cycles see detached twins, backward passes run one graph after the other."""
    recurrence = Recurrence(loops, 5, 6)
    expected = gradients(recurrence, recurrence.specification())
    for leaf in recurrence.leaves:
        leaf.grad = None

    def twin(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_()

    deferred, cycles = DeferredGradients(), range(loops + 1)
    embedding = twin(recurrence.embedding)
    state, sources, routings = embedding, [embedding], [route(embedding, *recurrence.routers[0])]
    ends: list[tuple[list[Tensor], list[Tensor]]] = []  # of each graph: what it computed, and its twins
    routing = routings[0]
    for cycle in cycles:
        output = recurrence.block(cycle, state)
        router = recurrence.routers[cycle + 1] if cycle < loops else None
        output_twin, routing_twin = twin(output), twin(routing)
        ends.append(([output, routing], [output_twin, routing_twin]))
        sources, routings = [*sources, output_twin], [*routings[:cycle], routing_twin]
        state, routing = next_state(sources, routings, router, deferred=deferred)
    for cycle, (computed, twins) in reversed(list(enumerate(ends))):
        if cycle == loops:
            state.backward(cotangent(state))
        torch.autograd.backward(computed, [t.grad for t in twins])
    actual = [embedding.grad, *(leaf.grad for leaf in recurrence.leaves[1:])]
    assert_all_close(actual, expected, 1e-10)


def test_earlier_sources_are_left_to_their_own_boundary():
    """No gradient of [S, B, D] is written that autograd would have to add to another."""
    sources = [torch.randn(4, 2, 8, requires_grad=True) for _ in range(4)]
    routings = [torch.rand(4, 2, 10, requires_grad=True) for _ in range(3)]
    state, _ = next_state(sources, routings, deferred=DeferredGradients())
    state.sum().backward()
    assert [tensor.grad is not None for tensor in sources] == [False, False, False, True]
    assert [tensor.grad is not None for tensor in routings] == [False, False, True]


def test_keeps_the_history_and_no_copy_of_it():
    sources = [torch.randn(64, 2, 128, requires_grad=True) for _ in range(3)]
    routings = [torch.rand(64, 2, 10, requires_grad=True) for _ in range(2)]
    router = RouterWeights(torch.randn(10, 128, requires_grad=True), torch.zeros(10, requires_grad=True))
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        state, routing = next_state(sources, routings, router, deferred=DeferredGradients())
    alive = {tensor.untyped_storage().data_ptr() for tensor in (*sources, *routings, router.weight, state, routing)}
    assert set(saved) <= alive


def test_histories_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 sources need 1 routings"):
        next_state([torch.zeros(1, 1, 2)] * 2, [torch.zeros(1, 1, 4)] * 2, deferred=DeferredGradients())


def test_kernel_names(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_memory_kernel("auto", cpu) == "torch"
    assert resolve_memory_kernel("torch", cpu) == "torch"
    assert resolve_memory_kernel("slots", cpu) == "slots"
    with pytest.raises(ValueError, match="--memory-kernel flash: one of auto, fused"):
        resolve_memory_kernel("flash", cpu)
    monkeypatch.setattr("mesh_megatron.model.kernels.availability._has_triton", lambda: False)
    assert resolve_memory_kernel("auto", torch.device("cuda")) == "torch"
    with pytest.raises(ValueError, match="pip install triton"):
        resolve_memory_kernel("fused", torch.device("cuda"))
