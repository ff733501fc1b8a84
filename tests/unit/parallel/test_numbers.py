"""Numbers of tokens inside a state: the same bits at the other end, and so their gradients."""

from __future__ import annotations

import pytest
import torch

from mesh_megatron.parallel.numbers import as_state, channels, numbers_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_and_their_gradients_keep_every_bit(dtype):
    draw = torch.Generator().manual_seed(1)
    numbers = torch.randn(5, 2, 3, generator=draw).mul(10.0 ** torch.arange(-20, 10, 10)).requires_grad_()
    wanted = torch.randn(5, 2, 3, generator=draw)  # halves of a number may look like a NaN of 16 bits
    wanted[0, 0, 0], wanted[1, 0, 0] = torch.tensor(0x7F81_FF85).to(torch.int32).view(torch.float32), -0.0
    state = as_state(numbers, 8, dtype)
    assert (state.shape, state.dtype) == ((5, 2, 8), dtype)
    assert not state[..., channels(3, dtype) :].any()
    received = state.detach().clone().requires_grad_()  # as between two ranks
    found = numbers_of(received, 3)
    assert torch.equal(found, numbers)
    found.backward(wanted)
    state.backward(received.grad)
    assert torch.equal(numbers.grad.view(torch.int32), wanted.view(torch.int32))
