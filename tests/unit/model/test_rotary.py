"""Rotary positions: Megatron-Core's arithmetic in torch, and the same rotation in one kernel."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from test_mesh_model import build

from mesh_megatron.model import rotary
from mesh_megatron.model.transformer_config import transformer_config

pytestmark = pytest.mark.usefixtures("one_rank")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # S, B, heads, channels, channels that turn
    (5, 3, 4, 16, 4),
    (7, 2, 3, 20, 20),
    (3, 1, 1, 6, 2),
    (2, 2, 40, 128, 32),
]


def angles(positions: int, turning: int) -> torch.Tensor:
    frequencies = 10000 ** (-torch.arange(0, turning, 2).float() / turning)
    half = torch.outer(torch.arange(positions).float(), frequencies)
    return torch.cat([half, half], dim=-1)[:, None, None, :].to(DEVICE)


def heads(shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> torch.Tensor:
    s, b, h, d, _ = shape
    x = torch.randn(s, b, h, 3 * d, generator=torch.Generator().manual_seed(s)).to(DEVICE, dtype)
    return x[..., d : 2 * d] if strided else x[..., :d].contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_in_torch_as_megatron_core(shape, dtype):
    config = transformer_config(build().model)
    config.params_dtype = dtype
    x, turns = heads(shape, dtype, strided=True), angles(shape[0], shape[-1])
    expected = _apply_rotary_pos_emb_bshd(x, turns)
    assert torch.equal(rotary.turn_by_torch(x, rotary.rotations_of(turns, config)), expected)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_within_one_rounding_of_float64(shape, dtype, strided):
    pytest.importorskip("triton", reason="Triton is not installed (requirements/dev.txt)")
    x = heads(shape, dtype, strided).requires_grad_()
    turns = angles(shape[0], shape[-1])
    rotations = torch.stack([turns.cos(), turns.sin()])
    out = rotary._Turn.apply(x, rotations)
    grad = heads(shape, dtype, strided).flip(0)
    (found,) = torch.autograd.grad(out, x, grad)
    exact = x.detach().double().requires_grad_()
    expected = rotary.turn_by_torch(exact, rotations.double())
    (truth,) = torch.autograd.grad(expected, exact, grad.double())
    for actual, right in ((out, expected), (found, truth)):
        assert actual.dtype == dtype and actual.shape == x.shape
        tolerance = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
        assert (actual.double() - right).norm() <= tolerance * right.norm()


def test_a_model_with_the_kernel_is_the_same_model():
    pytest.importorskip("triton", reason="Triton is not installed (requirements/dev.txt)")
    plain, fused = build(rotary_percent=0.5).to(DEVICE), build(rotary_percent=0.5).to(DEVICE)
    for module in fused.modules():
        if hasattr(module, "config"):
            module.config.fused_rotary = True
    tokens = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    losses = [model(tokens, None, tokens.roll(-1, 1)) for model in (plain, fused)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for (name, left), right in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_cosines_are_computed_once_a_pass(monkeypatch):
    made = []
    for owner in (torch, torch.Tensor):  # Megatron-Core calls the function, we the method
        monkeypatch.setattr(owner, "cos", lambda x, real=owner.cos: made.append(x) or real(x))
    build().to(DEVICE)(torch.randint(128, (2, 16), device=DEVICE))
    assert len(made) == 1
