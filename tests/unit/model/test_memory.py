"""The history form against the literal slots, values and gradients."""

import pytest
import torch

from mesh_megatron.model.memory import mix, mix_slots

CASES = [(cycle, cycle + extra) for cycle in range(5) for extra in range(1, 5)]


def random_history(cycle: int, slots: int, dtype: torch.dtype, seed: int = 0, shape=(5, 3, 7)):
    """Sources (h_emb, y_0..y_c), writes (w_0..w_c) and the read weights, all leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    sources = [normal(*shape).to(dtype).requires_grad_() for _ in range(cycle + 2)]
    weights = [normal(*shape[:2], slots).softmax(-1).to(weight_dtype).requires_grad_() for _ in range(cycle + 2)]
    return sources, weights[:-1], weights[-1]


def gradients(function, sources, writes, read):
    state = function(sources, writes, read)
    cotangent = torch.randn(state.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return state, torch.autograd.grad(state, [*sources, *writes, read], cotangent.to(state.dtype))


@pytest.mark.parametrize(("cycle", "slots"), CASES)
def test_history_equals_slots(cycle, slots):
    history = random_history(cycle, slots, torch.float64, seed=cycle * 10 + slots)
    state, grads = gradients(mix, *history)
    expected, expected_grads = gradients(mix_slots, *history)
    torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulates_in_float32(dtype):
    sources, writes, read = random_history(3, 6, dtype)
    state = mix(sources, writes, read)
    assert state.dtype == dtype
    exact = mix_slots([s.double() for s in sources], [w.double() for w in writes], read.double())
    rounding = 1e-6 if dtype == torch.float32 else 0  # one rounding at the end, none between
    torch.testing.assert_close(state.double(), exact.to(dtype).double(), rtol=2 * torch.finfo(dtype).eps, atol=rounding)


def test_one_write_for_every_output():
    sources, writes, read = random_history(2, 4, torch.float32)
    with pytest.raises(ValueError):
        mix(sources, writes[:-1], read)
