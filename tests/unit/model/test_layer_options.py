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


LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {**RMS, "swiglu": True, "parallel_residual": False}], ids=str)
def test_a_low_rank_difference_is_another_matrix_in_each_loop(fields):
    model = build(loop_lora_rank=3, **fields)
    move(model)
    state = torch.randn(16, 2, 32)
    rotations = model.rotations(state)
    outputs = []
    for loop in (0, 1, 2, 3):
        plain = build(**fields)
        plain.load_state_dict(model.state_dict(), strict=False)
        for layer, with_difference in zip(plain.block(1).layers, model.block(1).layers, strict=True):
            for name in LINEARS:
                linear = with_difference.get_submodule(name)
                own = min(loop, 2)  # a loop beyond the third takes the third's
                b = linear.loop_up[own].reshape(-1, 3)
                layer.get_submodule(name).weight += b @ linear.loop_down[own]
        expected = plain.block(1)(state, None, rotary_pos_emb=rotations)
        outputs.append(model.block(1)(state, None, rotary_pos_emb=rotations, loop=loop))
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2) and torch.equal(outputs[2], outputs[3])


def test_low_rank_differences_start_at_zero():
    model, plain = build(loop_lora_rank=3, swiglu=True), build(swiglu=True)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    model(TOKENS, None, TOKENS).mean().backward()
    for name, parameter in model.named_parameters():
        if "loop_" in name:
            assert parameter.shape[0] == 3 and parameter.any() == name.endswith("loop_down")
            assert all(gradient.any() == name.endswith("loop_up") for gradient in parameter.grad), name


@pytest.mark.parametrize("backprop_loops", [None, 1])
def test_differences_of_loops_left_out_get_a_gradient_of_zero(backprop_loops):
    model = build(loop_lora_rank=3)
    move(model)
    model.config.backprop_loops = backprop_loops
    model.set_loops(2)
    model(TOKENS, None, TOKENS).mean().backward()
    for name, parameter in model.named_parameters():
        if "loop_" in name:
            assert [bool(gradient.any()) for gradient in parameter.grad] == [backprop_loops is None, True, False], name


def test_flops_of_low_rank_differences():
    from mesh_megatron.planning.flops import training_flops_per_token

    model, plain = build(loop_lora_rank=3, swiglu=True), build(swiglu=True)
    differences = sum(p.numel() for name, p in model.named_parameters() if "loop_" in name)  # of all three loops
    flops, without = (training_flops_per_token(each.model, VOCABULARY) for each in (model, plain))
    assert flops.total - without.total == 6 * differences
