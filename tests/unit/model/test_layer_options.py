"""Layers with options around their branches, against their equations."""

from __future__ import annotations

import pytest
import torch
from test_mesh_model import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_rank")
TOKENS = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
RMS = {"normalization": "RMSNorm", "disable_bias_linear": True}


def move(model, scale: float = 0.3) -> None:
    """Move every parameter of layers away from its initial value, so that nothing cancels by accident."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def normed(norm, state, loop: int):
    """The norm written out, with the weights of a loop if it has such."""
    weight = norm.weight[loop] if norm.weight.dim() == 2 else norm.weight
    if not hasattr(norm, "bias"):
        return state / (state.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight
    centred = state - state.mean(-1, keepdim=True)
    bias = norm.bias[loop] if norm.bias.dim() == 2 else norm.bias
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight + bias


def added(output) -> torch.Tensor:
    """A branch's output with its bias."""
    value, bias = output
    return value if bias is None else value + bias


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"per_loop_norms": True}, RMS, {**RMS, "per_loop_norms": True}], ids=str)
@pytest.mark.parametrize("parallel", [True, False])
def test_a_sandwich_norms_both_ends_of_a_branch(parallel, fields):
    model = build(sandwich_norm=True, parallel_residual=parallel, recurrence="base", **fields)
    move(model)
    state = torch.randn(16, 2, 32)
    rotations = model.rotations(state)

    def branches(layer, x, loop):
        def attention(y):
            out = layer.self_attention(normed(layer.input_layernorm, y, loop), None, rotary_pos_emb=rotations)
            return normed(layer.attention_output_layernorm, added(out), loop)

        def mlp(y):
            return normed(layer.mlp_output_layernorm, added(layer.mlp(normed(layer.pre_mlp_layernorm, y, loop))), loop)

        if parallel:
            return x + attention(x) + mlp(x)
        return x + attention(x) + mlp(x + attention(x))

    for loop in range(3):
        expected = state
        for layer in model.block(1).layers:
            expected = branches(layer, expected, loop)
        actual = model.block(1)(state, None, rotary_pos_emb=rotations, loop=loop)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    prelude = branches(model.prelude.layers[0], state, 0)
    torch.testing.assert_close(model.prelude(state, None, rotary_pos_emb=rotations), prelude, rtol=1e-4, atol=1e-5)
