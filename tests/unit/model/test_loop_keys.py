"""Later loops that attend to the first loop's keys and values, against the equation written out."""

from __future__ import annotations

import pytest
import torch
from test_layer_options import TOKENS, move, normed
from test_mesh_model import build
from torch import Tensor

from mesh_megatron.config.model import ModelConfig

pytestmark = pytest.mark.usefixtures("one_rank")
LLAMA = {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True, "parallel_residual": False}
OPTIONS = [
    {},
    {"num_query_groups": 2, "rotary_percent": 1.0, **LLAMA},
    {"num_query_groups": 1, "qk_layernorm": True, "kv_channels": 16, "disable_bias_linear": True, "add_qkv_bias": True},
    {"sandwich_norm": True, "per_loop_norms": True, "loop_norm": True, "loop_embedding": True},
    {"loop_lora_rank": 3, "num_query_groups": 2, "swiglu": True},
]


def rotated(x_SBHd: Tensor, config: ModelConfig) -> Tensor:
    size = config.rotary_size
    angles = torch.arange(len(x_SBHd))[:, None] / config.rotary_base ** (torch.arange(0, size, 2) / size)
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    first, second, kept = x_SBHd.split([size // 2, size // 2, x_SBHd.shape[-1] - size], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, kept], dim=-1)


def product(linear, x: Tensor, loop: int) -> Tensor:
    weight = linear.weight
    if hasattr(linear, "loop_up"):
        weight = weight + linear.loop_up[loop].flatten(0, -2) @ linear.loop_down[loop]
    return x @ weight.T + (0 if linear.bias is None else linear.bias)


def attention(layer, x: Tensor, loop: int, config: ModelConfig, kept: dict) -> Tensor:
    """Causal attention, head by head; from the second loop on to the keys and values ``kept`` of the first."""
    module, size = layer.self_attention, config.head_size
    queries = config.num_attention_heads // config.query_groups
    groups = product(module.linear_qkv, x, loop).unflatten(-1, (config.query_groups, queries + 2, size))

    def head(part: Tensor, norm) -> Tensor:
        return rotated(normed(norm, part, 0) if config.qk_layernorm else part, config)

    if loop == 0:
        kept[layer] = head(groups[..., -2, :], module.k_layernorm), groups[..., -1, :]
    key, value = kept[layer]
    hidden = torch.full((len(x), len(x)), -torch.inf).triu(1)
    outputs = []
    for group in range(config.query_groups):
        for query in head(groups[..., group, :-2, :], module.q_layernorm).unbind(-2):
            scores = torch.einsum("sbd,tbd->bst", query, key[..., group, :]) / size**0.5 + hidden
            outputs.append(torch.einsum("bst,tbd->sbd", scores.softmax(-1), value[..., group, :]))
    return product(module.linear_proj, torch.cat(outputs, -1), loop)


def mlp(layer, x: Tensor, loop: int, config: ModelConfig) -> Tensor:
    inner = product(layer.mlp.linear_fc1, x, loop)
    if config.swiglu:
        gate, up = inner.chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
    else:
        inner = torch.nn.functional.gelu(inner)
    return product(layer.mlp.linear_fc2, inner, loop)


def core(layers, state: Tensor, loop: int, config: ModelConfig, kept: dict) -> Tensor:
    for layer in layers:
        added = attention(layer, normed(layer.input_layernorm, state, loop), loop, config, kept)
        if config.sandwich_norm:
            added = normed(layer.attention_output_layernorm, added, loop)
        middle = state + added
        read = state if config.parallel_residual else middle
        added = mlp(layer, normed(layer.pre_mlp_layernorm, read, loop), loop, config)
        if config.sandwich_norm:
            added = normed(layer.mlp_output_layernorm, added, loop)
        state = middle + added
    return state


def literal(model, tokens: Tensor) -> Tensor:
    """Sum of losses of base recursion, with a graph of torch's own from every loop to the first one's keys."""
    config, kept = model.model, {}
    state = model.embed(tokens)
    rotations = model.rotations(state)
    state = model.prelude(state, None, rotary_pos_emb=rotations)
    for loop in range(config.segments.loops):
        state = core(model.core[0].layers, model.recurrence.core_input(loop + 1, state), loop, config, kept)
    return model.head(model.coda(state, None, rotary_pos_emb=rotations), tokens)


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_later_loops_attend_to_the_first_loops_keys_and_values(fields, recompute):
    """Losses and all gradients, also with every layer computed again in the backward pass."""
    model = build(recurrence="base", share_kv_across_loops=True, **fields)
    move(model, 0.1)
    if recompute:
        config = model.core[0].config
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    expected = literal(model, TOKENS)
    of_equation = gradients(model, expected)
    calls = []
    model.core[0].layers[1].register_forward_hook(lambda *_: calls.append(1))
    actual = model(TOKENS, None, TOKENS)
    torch.testing.assert_close(actual, expected)
    of_model = gradients(model, actual)
    assert len(calls) == 3 * (2 if recompute else 1)
    for name, gradient in of_model.items():
        torch.testing.assert_close(gradient, of_equation[name], rtol=1e-3, atol=1e-4, msg=name)
    unshared = build(recurrence="base", **fields)
    unshared.load_state_dict(model.state_dict())
    assert not torch.allclose(unshared(TOKENS, None, TOKENS), actual, rtol=1e-4)


def test_a_core_that_runs_once_is_as_without_the_flag():
    model, plain = build(share_kv_across_loops=True, layout="1+2R1+1"), build(layout="1+2R1+1")
    assert torch.equal(model(TOKENS), plain(TOKENS))
    theirs, ours = (gradients(each, each(TOKENS, None, TOKENS)) for each in (plain, model))
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())


@torch.no_grad()
def test_rows_of_keys_and_values_matter_to_the_first_loop_alone():
    """The first loop alone reads the other rows of the projection: the product of later ones has queries only."""
    model, widths = build(share_kv_across_loops=True, num_query_groups=2), []
    for layer in model.core[0].layers:
        layer.self_attention.linear_qkv.register_forward_hook(lambda *call: widths.append(call[-1][0].shape[-1]))
    model(TOKENS)
    assert widths == 2 * [32 + 2 * 2 * 8] + 4 * [32]
