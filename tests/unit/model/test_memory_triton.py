"""The Triton kernel against the same arithmetic in float64; in Triton's interpreter where there is no GPU.

(``tests/conftest.py`` turns the interpreter on.)
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_memory_op import Recurrence, assert_all_close, gradients

from mesh_megatron.model.kernels import memory_torch
from mesh_megatron.model.kernels.memory_torch import Boundary, LaterGradient
from mesh_megatron.model.memory import gated
from mesh_megatron.model.memory_op import resolve_memory_kernel, route

triton = pytest.importorskip("triton", reason="Triton is not installed (requirements/dev.txt)")
from mesh_megatron.model.kernels import memory_triton, route_triton, tiles  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Inputs:
    """Random arguments of one boundary: cycle c of K, with or without a router for the next cycle."""

    def __init__(self, cycle, loops, slots, shape, dtype, route=True, layout="contiguous", gate="softmax") -> None:
        generator = torch.Generator().manual_seed(cycle + 10 * loops + 100 * slots)

        def normal(*size):
            return torch.randn(*size, generator=generator).to(DEVICE)

        def tensor():
            s, b, d = shape
            if layout == "batch first":
                return normal(b, s, d).to(dtype).transpose(0, 1)
            if layout == "slice":
                return normal(s + 1, b, 2 * d).to(dtype)[1:, :, d:]
            if layout == "strided channels":
                return normal(s, b, 2 * d).to(dtype)[..., ::2]
            return normal(*shape).to(dtype)

        def routing():
            return gated(normal(*shape[:2], 2 * slots), gate)

        self.gate = gate

        self.sources = [tensor() for _ in range(cycle + 2)]
        self.routings = [routing() for _ in range(cycle + 1)]
        self.weight = normal(2 * slots, shape[-1]) * shape[-1] ** -0.5 if route else None  # no softmax saturates
        self.bias = normal(2 * slots) if route else None
        self.grad_state = tensor()
        self.grad_routing = normal(*shape[:2], 2 * slots) if route else None
        self.later = [LaterGradient(tensor(), routing(), normal(*shape[:2], j + 2)) for j in range(loops, cycle, -1)]

    def run(self, implementation):
        """Every output, by name; the backward pass is fed the rounded state in either precision."""
        state, routing = implementation.forward(self.sources, self.routings, self.weight, self.bias, self.gate)
        boundary = Boundary(self.sources, self.routings, state, routing, self.weight, self.gate)
        grads = implementation.backward(boundary, self.grad_state, self.grad_routing, self.later)
        return {"next state": state, "next routing": routing, **{f"d {k}": v for k, v in grads._asdict().items()}}

    def in_float64(self, state, routing):
        """The truth for the same numbers; what is computed from the kernel's stored results starts from those."""
        wide = object.__new__(Inputs)
        for name, value in vars(self).items():
            setattr(wide, name, to_float64(value))
        truth = {"next state": memory_torch.forward(wide.sources, wide.routings, None, None)[0], "next routing": None}
        state, routing = to_float64(state), to_float64(routing)
        if wide.weight is not None:
            truth["next routing"] = gated(F.linear(state, wide.weight, wide.bias), self.gate)
        boundary = Boundary(wide.sources, wide.routings, state, routing, wide.weight, self.gate)
        grads = memory_torch.backward(boundary, wide.grad_state, wide.grad_routing, wide.later)
        return truth | {f"d {k}": v for k, v in grads._asdict().items()}


def to_float64(value):
    if isinstance(value, LaterGradient):
        return LaterGradient(*map(to_float64, value))
    if isinstance(value, list):
        return [to_float64(item) for item in value]
    return value.double() if isinstance(value, torch.Tensor) else value


def assert_within_dtype_error(inputs: Inputs) -> None:
    actual = inputs.run(memory_triton)
    expected = inputs.in_float64(actual["next state"], actual["next routing"])
    for name, value in actual.items():
        truth = expected[name]
        assert (value is None) == (truth is None), name
        if value is None:
            continue
        summed = 64 * torch.finfo(torch.float32).eps
        stored = torch.finfo(value.dtype).eps  # one rounding to the dtype it is stored in
        if name == "d weight":
            # The state is formed again backwards, where a last bit of float32 decides now and then how it is rounded.
            stored += torch.finfo(inputs.sources[0].dtype).eps / 8
        error = (value.double() - truth).norm()
        assert error <= (stored + summed) * truth.norm(), (name, error.item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("cycle", "loops", "slots", "shape"),
    [
        (0, 1, 1, (5, 3, 16)),
        (0, 2, 5, (7, 3, 77)),
        (1, 2, 5, (3, 5, 130)),
        (2, 3, 16, (33, 1, 64)),
        (3, 8, 11, (1, 2, 33)),
        (1, 3, 40, (3, 2, 48)),
    ],
)
def test_within_dtype_error_of_float64(cycle, loops, slots, shape, dtype):
    assert_within_dtype_error(Inputs(cycle, loops, slots, shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("cycle", "loops", "slots", "shape"), [(0, 2, 5, (7, 3, 77)), (1, 3, 40, (3, 2, 48)), (2, 2, 1, (5, 1, 16))]
)
def test_sigmoid_gates(cycle, loops, slots, shape, dtype):
    assert_within_dtype_error(Inputs(cycle, loops, slots, shape, dtype, gate="sigmoid"))


def test_sigmoid_gates_far_from_zero():
    """Closed gates are zero and open ones one, without an overflow on the way."""
    inputs = Inputs(0, 1, 2, (2, 1, 4), torch.float32, gate="sigmoid")
    inputs.weight, inputs.bias = torch.zeros_like(inputs.weight), torch.tensor([-200.0, 200, -200, 200], device=DEVICE)
    _, routing = memory_triton.forward(inputs.sources, inputs.routings, inputs.weight, inputs.bias, "sigmoid")
    assert routing.flatten(0, 1).tolist() == [[0, 1, 0, 1]] * 2


@pytest.mark.parametrize("cycle", [0, 2])
def test_without_a_router(cycle):
    assert_within_dtype_error(Inputs(cycle, 2, 5, (6, 3, 40), torch.bfloat16, route=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["batch first", "slice", "strided channels"])
def test_strided_histories(layout, dtype):
    assert_within_dtype_error(Inputs(1, 2, 5, (7, 3, 70), dtype, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cycle", "route"), [(0, True), (2, True), (2, False)])
def test_wide_tiles(monkeypatch, cycle, route, dtype):
    """Tiles that the forward kernel uses for many tokens; the last tile in each direction is incomplete."""
    monkeypatch.setattr(tiles, "WIDE_FROM_TOKENS", 1)
    assert_within_dtype_error(Inputs(cycle, 2, 5, (29, 5, 80), dtype, route=route))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "batch first", "strided channels"])
@pytest.mark.parametrize(("slots", "shape"), [(5, (27, 5, 80)), (1, (3, 1, 7)), (40, (3, 2, 77))])
def test_a_routing_by_itself(slots, shape, layout, dtype, gate):
    inputs = Inputs(0, 1, slots, shape, dtype, layout=layout, gate=gate)
    state, leaves = inputs.sources[0], [inputs.sources[0], inputs.weight, inputs.bias]
    exact = [to_float64(leaf).requires_grad_() for leaf in leaves]
    routing, expected = route_triton.forward(state, inputs.weight, inputs.bias, gate), route(*exact, gate=gate)
    expected.backward(inputs.grad_routing.double())
    actual = route_triton.backward(inputs.grad_routing, routing, state, inputs.weight, gate)
    for value, truth in zip([routing, *actual], [expected, *(leaf.grad for leaf in exact)], strict=True):
        tolerance = torch.finfo(value.dtype).eps + 64 * torch.finfo(torch.float32).eps
        assert (value.double() - truth).norm() <= tolerance * truth.norm() + 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_widest_model(monkeypatch, dtype):
    monkeypatch.setattr(tiles, "CHANNELS", 64 if DEVICE.type == "cuda" else 512)  # the interpreter is slow
    assert_within_dtype_error(Inputs(0, 1, 16, (3, 1, 8192), dtype))


def test_several_blocks_to_a_token_range(monkeypatch):
    """The router's gradient is summed over ranges of tokens; the last one is ragged."""
    monkeypatch.setattr(tiles, "WEIGHT_CHUNKS", 3)
    tokens = tiles.TOKENS * 5 - 3
    assert_within_dtype_error(Inputs(0, 1, 2, (tokens, 1, 3), torch.float32))


@pytest.mark.parametrize("form", [("state", "softmax"), ("state", "sigmoid"), ("rmsnorm", "sigmoid")], ids="-".join)
@pytest.mark.parametrize(("loops", "slots", "width"), [(1, 4, 6), (3, 6, 66)])
def test_whole_recurrence_equals_the_slots(loops, slots, width, form):
    recurrence = Recurrence(loops, slots, width, torch.float32, form, device=DEVICE)
    exact = recurrence.in_float64()
    state, expected = recurrence.run("fused"), exact.specification()
    torch.testing.assert_close(state.double(), expected, rtol=1e-5, atol=1e-5)
    actual = [grad.double() for grad in gradients(recurrence, state)]
    assert_all_close(actual, gradients(exact, expected), 2e-4)


def test_run_to_run_identical():
    inputs = Inputs(1, 2, 5, (9, 3, 70), torch.bfloat16)
    first, second = inputs.run(memory_triton), inputs.run(memory_triton)
    for name, value in first.items():
        assert value is None or torch.equal(value, second[name]), name


def test_float64_is_refused():
    inputs = Inputs(0, 1, 2, (2, 1, 4), torch.float64)
    with pytest.raises(ValueError, match="no float64: use --memory-kernel torch"):
        inputs.run(memory_triton)


def test_resolves(monkeypatch):
    assert resolve_memory_kernel("fused", DEVICE) == "fused"
    assert resolve_memory_kernel("auto", torch.device("cuda")) == "fused"
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="--memory-kernel fused needs a GPU and the model is on cpu"):
        resolve_memory_kernel("fused", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cycle", "loops", "slots"), [(0, 2, 5), (2, 2, 5), (3, 8, 16)])
def test_at_training_size(cycle, loops, slots, dtype):
    assert tiles.WIDE_FROM_TOKENS <= 4096 * 2
    assert_within_dtype_error(Inputs(cycle, loops, slots, (4096, 2, 2048), dtype))
