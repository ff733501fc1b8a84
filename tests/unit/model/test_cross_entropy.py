"""The loss in chunks against torch's cross-entropy in float64; the Triton kernels run in the interpreter on a CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_mesh_model import build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mesh_megatron.model.cross_entropy import resolve_loss_kernel, summed_cross_entropy

pytestmark = pytest.mark.usefixtures("one_rank")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = ["torch", "fused"] if importlib.util.find_spec("triton") else ["torch"]
# Of the largest entry: a float32 sum's rounding; bfloat16 and float16 logits carry theirs into everything.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
AT_TRAINING_SIZE = {**TOLERANCE, torch.float32: 5e-5}  # sums over 52,352 terms


def inputs(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    state = torch.randn(tokens, width, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * 3 * width**-0.5).to(DEVICE, dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE)
    weights = (torch.rand(tokens, generator=generator) > 0.3).float().to(DEVICE) * 0.5
    return state, weight, labels, weights


def chunked(state: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, chunk: int, kernel: str) -> Tensor:
    group = dist.group.WORLD
    return summed_cross_entropy(state, weight, labels, weights, group=group, chunk_tokens=chunk, kernel=kernel)[0]


def assert_is_the_loss(
    state: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    chunk: int,
    kernel: str,
    tolerances: dict[torch.dtype, float] = TOLERANCE,
) -> None:
    loss = chunked(state, weight, labels, weights, chunk, kernel)
    (0.25 * loss).backward()
    wide_state, wide_weight = (x.detach().double().requires_grad_() for x in (state, weight))
    expected = (F.cross_entropy(wide_state @ wide_weight.T, labels, reduction="none") * weights).sum()
    (0.25 * expected).backward()
    tolerance = tolerances[state.dtype]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, theirs in ((state.grad, wide_state.grad), (weight.grad, wide_weight.grad)):
        assert ours.dtype == state.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "chunk"), [(7, 100), (12, 4), (13, 5)])
def test_loss_and_gradients(tokens: int, chunk: int, dtype: torch.dtype, kernel: str) -> None:
    assert_is_the_loss(*inputs(tokens, 16, 300, dtype), chunk, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_extreme_logits(kernel: str) -> None:
    state, weight, labels, weights = inputs(6, 8, 40, torch.float32)
    with torch.no_grad():
        state *= 1e4
    assert_is_the_loss(state, weight, labels, weights, 4, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_shows(kernel: str) -> None:
    state, weight, labels, weights = inputs(6, 8, 40, torch.float32)
    with torch.no_grad():
        state[2, 3] = torch.nan
    assert chunked(state, weight, labels, torch.ones_like(weights), 4, kernel).isnan()


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor made inside has, of any dtype and in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("with_gradients", [True, False])
def test_all_logits_never_exist(with_gradients: bool) -> None:
    arguments = inputs(256, 8, 512, torch.bfloat16)
    found = {}
    for chunk in (16, 256):
        with Largest() as largest, torch.set_grad_enabled(with_gradients):
            loss = chunked(*arguments, chunk, "torch")
            if with_gradients:
                loss.backward()
        found[chunk] = largest.elements
    assert found == {16: 16 * 512, 256: 256 * 512}


def test_peak_memory() -> None:
    """Memory at once: a chunk's logits and the gradients of state and weight, but never the logits of all tokens."""

    def peak(chunk: int) -> int:
        state, weight, labels, weights = inputs(512, 16, 2048, torch.float32)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            chunked(state, weight, labels, weights, chunk, "torch").backward()
        held = most = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most

    all_logits, gradients = 512 * 2048 * 4, 2 * (512 + 2048) * 16 * 4
    assert peak(512) > all_logits
    assert peak(32) < all_logits / 8 + gradients


def test_evaluation_keeps_nothing() -> None:
    state, weight, labels, weights = inputs(6, 8, 40, torch.float32)
    with torch.no_grad():
        loss = chunked(state, weight, labels, weights, 4, "torch")
    assert not loss.requires_grad
    torch.testing.assert_close(loss, chunked(state, weight, labels, weights, 4, "torch").detach())


def test_gradients_are_for_one_pass() -> None:
    loss = chunked(*inputs(6, 8, 40, torch.float32), 4, "torch")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


@pytest.mark.parametrize("fields", [{}, {"untie_embeddings_and_output_weights": False}], ids=["untied", "tied"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_models_loss_is_that_of_its_logits(kernel: str, fields: dict) -> None:
    model = build(loss_kernel=kernel, loss_chunk_tokens=5, **fields)
    tokens, labels = (torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    mask = (torch.arange(32).reshape(2, 16) % 3 > 0).float()
    losses = F.cross_entropy(model(tokens).transpose(1, 2), labels, reduction="none")
    (losses * mask).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    loss = model(tokens, None, labels, mask)
    loss.backward()
    torch.testing.assert_close(loss, (losses * mask).sum())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(model(tokens, None, labels), losses.sum())


def test_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolve_loss_kernel("auto", cpu) == resolve_loss_kernel("torch", gpu) == "torch"
    monkeypatch.setattr("mesh_megatron.model.kernels.availability._has_triton", lambda: False)
    assert resolve_loss_kernel("auto", gpu) == "torch"
    with pytest.raises(ValueError, match="--loss-kernel fused needs Triton"):
        resolve_loss_kernel("fused", gpu)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_training_size(dtype: torch.dtype, kernel: str) -> None:
    assert_is_the_loss(*inputs(5000, 1024, 52352, dtype), 2048, kernel, AT_TRAINING_SIZE)
