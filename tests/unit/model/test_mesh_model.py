"""The model against its equations: every scheme literally, GPT-NeoX as transformers has it, parameters counted."""

import math
import warnings
from functools import partial
from typing import get_args

import pytest
import torch
from loop_scheme_equations import LOOP_SCHEMES

from mesh_megatron.config.model import ModelConfig, Recurrence

pytestmark = pytest.mark.usefixtures("one_rank")
VOCABULARY = 128
SCHEMES = [name for name in get_args(Recurrence) if not name.startswith("vanilla")]


def build(seed: int = 1, **fields):
    from mesh_megatron.model.initialize import initialize_weights
    from mesh_megatron.model.layer import layer_specs
    from mesh_megatron.model.mesh_model import MeshModel
    from mesh_megatron.model.transformer_config import transformer_config

    defaults = {"layout": "1+2R3+1", "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
    config = ModelConfig(**{**defaults, **fields})
    model = MeshModel(config, transformer_config(config), VOCABULARY, layer_specs(config))
    initialize_weights(model, config, seed)
    return model


def shake(model, scale: float = 0.5) -> None:
    """Move every recurrence parameter away from its initial value, so that nothing cancels by accident."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        of_loops = [
            weight
            for name, weight in model.named_parameters()
            if ("layernorm" in name and weight.dim() == 2) or name.endswith(".loop_up")
        ]
        for parameter in (*model.recurrence.parameters(), *of_loops):
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.device)


def plain_norm(norm, loop: int):
    """The norm that has a loop's weights alone."""
    plain = (torch.nn.LayerNorm if hasattr(norm, "bias") else torch.nn.RMSNorm)(norm.weight.shape[-1], norm.eps)
    for name, parameter in norm.named_parameters():
        plain.register_parameter(name, torch.nn.Parameter(parameter[loop].detach()))
    return plain


def literal(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits by the equations of Sections 3.1 and 3.2, with slots where the scheme is mesh."""
    config, scheme = model.model, model.model.scheme
    h_emb = model.embed(tokens)
    rotations = model.rotations(h_emb)

    def run(block, state):
        return block(state, None, rotary_pos_emb=rotations)

    norms = {layer: (layer.input_layernorm, layer.pre_mlp_layernorm) for layer in model.block(1).layers}

    def run_loop(loop, state):
        if config.loop_norm:
            rms = (state.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt()
            state = state / rms * model.recurrence.loop_norm.weight
        if config.loop_embedding:
            state = state + model.recurrence.loop_embedding.weight[loop]
        for layer in model.block(loop + 1).layers if config.per_loop_norms else ():
            layer.input_layernorm, layer.pre_mlp_layernorm = (plain_norm(norm, loop) for norm in norms[layer])
        return run(model.block(loop + 1), state)

    loops = config.segments.loops
    cores = [partial(run_loop, loop) for loop in range(loops)]
    if scheme == "mesh":
        slots = [h_emb] + [torch.zeros_like(h_emb) for _ in range(config.memory_slots - 1)]
        state = h_emb
        for cycle, block in enumerate([partial(run, model.prelude), *cores]):
            router = model.recurrence.routers[cycle]
            read_state = state
            if config.router_input == "normalized":
                read_state = torch.nn.functional.layer_norm(state, state.shape[-1:])
            elif config.router_input == "rmsnorm":
                read_state = state / (state.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            scale = 1 if config.router_scale is None else router.scale
            logits = (scale * (read_state @ router.weight.T) + router.bias) / config.router_temperature
            gate = torch.sigmoid if config.router_gate == "sigmoid" else lambda z: z.softmax(-1)
            write, read = map(gate, logits.chunk(2, -1))
            output = block(state)
            slots = [slot + write[..., b : b + 1] * output for b, slot in enumerate(slots)]
            state = sum(read[..., b : b + 1] * slot for b, slot in enumerate(slots))
    elif scheme in LOOP_SCHEMES:
        blocks = [partial(run, model.prelude), *cores]
        state = LOOP_SCHEMES[scheme](model.recurrence, h_emb, blocks, config)
    else:
        h0 = state = run(model.prelude, h_emb)
        for block in cores:
            output = block(state)
            if scheme in ("static", "dynamic"):
                if scheme == "static":
                    a1, a2, a3 = model.recurrence.coefficients
                else:
                    router = model.recurrence.router
                    a1, a2, a3 = (state @ router.weight.T + router.bias).unsqueeze(-2).unbind(-1)
                state = a1 * output + a2 * h0 + a3 * h_emb
            else:
                terms = {"base": 0 * state, "residual": state, "anchor": h0, "anchor_emb": h_emb}
                state = output + sum(terms[name] for name in scheme.split("+"))
    return model.head(run(model.coda, state), None)


@pytest.mark.parametrize("layout", ["1+2R3+1", "1+2+2+1"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scheme_is_its_equation(scheme, layout):
    model = build(recurrence=scheme, layout=layout)
    shake(model)
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(tokens), literal(model, tokens), rtol=1e-4, atol=2e-6)


OPTIONS_OF_SCHEMES = [
    {"router_input": "normalized"},
    {"router_input": "rmsnorm", "router_init_std": 0.0, "router_init": "sum"},
    {"num_memory_slots": 2},
    {"router_init": "base"},
    {"router_gate": "sigmoid", "router_init": "anchor_emb"},
    {"router_gate": "sigmoid", "router_input": "rmsnorm", "router_scale": 0.01, "router_temperature": 2.0},
    {"router_scale": 0.5, "router_temperature": 0.7},
    {"loop_norm": True},
    {"per_loop_norms": True},
    {"per_loop_norms": True, "normalization": "RMSNorm", "parallel_residual": False, "recurrence": "hyper"},
    {"loop_embedding": True, "recurrence": "hyper"},
    {"loop_norm": True, "loop_embedding": True, "recurrence": "residual"},
    {"loop_norm": True, "loop_embedding": True, "recurrence": "dynamic"},
    {"recurrence": "decay", "decay_input": "linear"},
    {"recurrence": "hyper", "hyper_lanes": 1},
    {"recurrence": "hyper-dynamic", "hyper_lanes": 4},
]


@pytest.mark.parametrize("fields", OPTIONS_OF_SCHEMES, ids=str)
def test_scheme_with_options_is_its_equation(fields):
    model = build(**fields)
    shake(model)
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(tokens), literal(model, tokens), rtol=1e-4, atol=2e-6)


def test_schemes_differ():
    """A scheme that fell back to another would pass any test of shapes."""
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
    outputs = []
    for scheme in SCHEMES:
        model = build(recurrence=scheme)
        shake(model)
        outputs.append(model(tokens))
    for i, one in enumerate(outputs):
        assert not any(torch.allclose(one, other, atol=1e-4) for other in outputs[:i])


def test_sharing_repeats_one_core():
    shared, unshared = build(recurrence="mesh", layout="1+2R2+1"), build(recurrence="mesh", layout="1+2+2+1")
    assert shared.block(1) is shared.block(2)
    assert unshared.block(1) is not unshared.block(2)
    names = {entry.key for entry in unshared.sharded_state_dict().values() if ".layers." in entry.key}
    assert {name.split(".")[2] for name in names if name.startswith("core.")} == {"0", "1", "2", "3"}


OPTIONS = [
    {},
    {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True, "parallel_residual": False},
    {"num_query_groups": 2, "rotary_percent": 1.0},
    {"untie_embeddings_and_output_weights": False, "embedding_scaling": False},
    {"kv_channels": 16, "ffn_hidden_size": 48},
    {"qk_layernorm": True},
    {"disable_bias_linear": True, "add_qkv_bias": True, "normalization": "RMSNorm"},
    {"router_scale": 0.01, "router_gate": "sigmoid", "router_input": "rmsnorm"},
]


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
@pytest.mark.parametrize("recurrence", ["vanilla", "static", "dynamic", "mesh", "vanilla+mesh"])
def test_planned_parameters_are_the_modules(recurrence, fields):
    from mesh_megatron.planning.parameters import count_parameters

    model = build(recurrence=recurrence, **fields)
    assert count_parameters(model.model, VOCABULARY).total == sum(p.numel() for p in model.parameters())
    loss = model(torch.randint(VOCABULARY, (2, 16)), None, torch.randint(VOCABULARY, (2, 16)))
    loss.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_embedding_may_start_with_a_deviation_of_its_own():
    own, usual = build(embedding_init_method_std=0.5), build()
    assert own.embedding.word_embeddings.weight.std().item() == pytest.approx(0.5, rel=0.05)
    for name, parameter in usual.named_parameters():
        assert torch.equal(parameter, own.get_parameter(name)) == (name != "embedding.word_embeddings.weight")


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_queries_and_keys_are_normalised_before_their_rotation(normalization):
    from mesh_megatron.model.rotary import turn_by_torch

    model = build(qk_layernorm=True, normalization=normalization, num_query_groups=2)
    attention = model.prelude.layers[0].self_attention
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if "layernorm" in name:
                parameter += torch.randn(parameter.shape)
    state = torch.randn(16, 2, 32)
    attention._rotations = rotations = model.rotations(state)
    seen = attention.get_query_key_value_tensors(state)
    weight, bias = attention.linear_qkv.weight, attention.linear_qkv.bias
    groups = torch.nn.functional.linear(state, weight, bias).view(16, 2, 2, 4, 8)  # 2 queries, key, value a group
    query, key, value = groups[..., :2, :].reshape(16, 2, 4, 8), groups[..., 2, :], groups[..., 3, :]

    def normalised(heads, norm):
        if normalization == "LayerNorm":
            return torch.nn.functional.layer_norm(heads, (8,)) * norm.weight + norm.bias
        return heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    torch.testing.assert_close(seen[0], turn_by_torch(normalised(query, attention.q_layernorm), rotations))
    torch.testing.assert_close(seen[1], turn_by_torch(normalised(key, attention.k_layernorm), rotations))
    torch.testing.assert_close(seen[2], value)


def test_reset_masks_cut_attention():
    model = build(recurrence="vanilla")
    tokens = torch.randint(VOCABULARY, (1, 16))
    mask = torch.triu(torch.ones(16, 16, dtype=torch.bool), 1)[None, None]
    torch.testing.assert_close(model(tokens, mask), model(tokens))
    cut = mask.clone()
    cut[..., 8:, :8] = True
    changed = tokens.clone()
    changed[:, :8] = 0
    torch.testing.assert_close(model(tokens, cut)[:, 8:], model(changed, cut)[:, 8:])


@pytest.mark.parametrize(("layers", "hidden", "heads"), [(2, 32, 4), (3, 48, 3), (4, 64, 2)])
def test_vanilla_is_gpt_neox(layers, hidden, heads):
    """Logits to 1e-5 and gradients to 1e-5 relative of transformers' own class, on the same weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = build(
        recurrence="vanilla", layout=str(layers), hidden_size=hidden, num_attention_heads=heads, embedding_scaling=False
    )
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * hidden, rotary_pct=0.25, hidden_act="gelu", layer_norm_eps=1e-5,
            use_parallel_residual=True, tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    pairs = gpt_neox_pairs(model, theirs)
    with torch.no_grad():
        for ours, reference in pairs:
            ours.copy_(torch.randn(ours.shape, generator=torch.Generator().manual_seed(ours.numel())) * 0.1)
            reference.copy_(ours)
    tokens = torch.randint(VOCABULARY, (2, 16))
    logits, expected = model(tokens), theirs(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    assert len(pairs) == len(list(model.parameters())) == len(list(theirs.parameters()))
    for ours, reference in pairs:
        assert (ours.grad - reference.grad).norm() <= 1e-5 * reference.grad.norm().clamp(min=1e-3)


def gpt_neox_pairs(model, theirs):
    body = theirs.gpt_neox
    pairs = [
        (model.embedding.word_embeddings.weight, body.embed_in.weight),
        (model.output_layer.weight, theirs.get_output_embeddings().weight),
        (model.final_norm.weight, body.final_layer_norm.weight),
        (model.final_norm.bias, body.final_layer_norm.bias),
    ]
    for ours, layer in zip([*model.prelude.layers, *model.coda.layers], body.layers, strict=True):
        modules = [
            (ours.input_layernorm, layer.input_layernorm),
            (ours.pre_mlp_layernorm, layer.post_attention_layernorm),
            (ours.self_attention.linear_qkv, layer.attention.query_key_value),
            (ours.self_attention.linear_proj, layer.attention.dense),
            (ours.mlp.linear_fc1, layer.mlp.dense_h_to_4h),
            (ours.mlp.linear_fc2, layer.mlp.dense_4h_to_h),
        ]
        pairs += [(getattr(a, name), getattr(b, name)) for a, b in modules for name in ("weight", "bias")]
    return pairs


def test_embedding_is_scaled():
    tokens = torch.randint(VOCABULARY, (1, 4))
    scaled, plain = build(), build(embedding_scaling=False)
    torch.testing.assert_close(scaled.embed(tokens), plain.embed(tokens) * math.sqrt(32))


def test_initial_weights_follow_the_table():
    model = build(recurrence="mesh", layout="2+4R4+2", hidden_size=128, router_init="base")
    weights = {entry.key: entry.data for entry in model.sharded_state_dict().values() if hasattr(entry, "data")}
    projected = weights["core.layers.1.mlp.linear_fc2.weight"]
    assert projected.std().item() == pytest.approx(0.02 / math.sqrt(2 * 20), rel=0.05)  # computed depth 2 + 4*4 + 2
    assert weights["core.layers.1.mlp.linear_fc1.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["prelude.layers.0.mlp.linear_fc1.layer_norm_weight"].eq(1).all()
    assert weights["prelude.layers.0.self_attention.linear_qkv.bias"].eq(0).all()
    write, read = weights["recurrence.routers.2.bias"].chunk(2)
    assert write.argmax() == read.argmax() == 3 and write.sum() == 3
    softer = build(recurrence="mesh", layout="2+4R4+2", router_init="base", router_bias=0.5)
    biases = {entry.key: entry.data for entry in softer.sharded_state_dict().values() if hasattr(entry, "data")}
    assert biases["recurrence.routers.2.bias"].tolist() == [0, 0, 0, 0.5, 0, 0, 0] * 2


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("start", ["base", "residual", "anchor", "anchor_emb", "sum"])
def test_states_start_as_the_scheme_that_the_biases_name(start, gate):
    """With weights of zero and strong biases; a softmax that reads two slots reads the mean of them."""
    from mesh_megatron.model.memory import gated, mix

    fields = {"router_init": start, "router_gate": gate, "router_bias": 40.0, "router_init_std": 0.0}
    model = build(recurrence="mesh", **fields)
    embedding, *outputs = sources = [torch.full((1, 1, 32), 10.0**i) for i in range(5)]
    writes = []
    for cycle, output in enumerate(outputs):
        router = model.recurrence.router(cycle)
        assert router.weight.eq(0).all()
        write, read = gated(router.bias.expand(1, 1, -1), gate).chunk(2, -1)
        writes.append(write)
        terms = [output]
        if start in ("residual", "sum"):  # all in one slot
            terms = sources[start == "residual" : cycle + 2]
        elif cycle > 0 and start != "base":
            terms.append(outputs[0] if start == "anchor" else embedding)
        shares = len(terms) if gate == "softmax" and start in ("anchor", "anchor_emb") else 1
        expected = sum(terms) / shares
        torch.testing.assert_close(mix(sources[: cycle + 2], writes, read), expected)


@pytest.mark.parametrize("scheme", ["mesh", "dynamic"])
def test_routers_have_a_deviation_of_their_own(scheme):
    drawn, wider, zero = (build(recurrence=scheme, router_init_std=std) for std in (None, 0.1, 0.0))
    for model, deviation in ((drawn, 0.02), (wider, 0.1), (zero, 0.0)):
        weights = [p for name, p in model.recurrence.named_parameters() if name.endswith("weight")]
        assert torch.cat([w.flatten() for w in weights]).std().item() == pytest.approx(deviation, rel=0.2)
    assert torch.equal(zero.prelude.layers[0].mlp.linear_fc1.weight, drawn.prelude.layers[0].mlp.linear_fc1.weight)


def test_initial_weights_depend_on_name_and_seed_alone():
    one, again, other = build(seed=1), build(seed=1, layout="1+2R2+2", recurrence="base"), build(seed=2)
    key = "self_attention.linear_qkv.weight"
    cores = [m.block(1).layers[1].self_attention.linear_qkv.weight for m in (one, again, other)]
    assert torch.equal(cores[0], cores[1]) and not torch.equal(cores[0], cores[2])
    assert not torch.equal(cores[0], one.block(1).layers[0].self_attention.linear_qkv.weight), key


def test_nvtx_ranges_name_the_same(monkeypatch):
    from megatron.core.utils import configure_nvtx_profiling

    names = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", names.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
    model, tokens = build(), torch.zeros(1, 16, dtype=torch.int64)
    model(tokens)
    assert names == []
    configure_nvtx_profiling(True)
    try:
        model(tokens)
    finally:
        configure_nvtx_profiling(False)
    ours = ["prelude", "core, loop 0", "core, loop 1", "core, loop 2", "coda", "head"]
    assert [name for name in names if name in ours] == ours


def test_a_profile_names_the_layers_in_the_order_they_run():
    model = build()
    tokens = torch.randint(VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(tokens, labels_BS=tokens)
    expected = ["prelude", "core, loop 0", "core, loop 1", "core, loop 2", "coda", "head"]
    marks = sorted((e.time_range.start, e.name) for e in profile.events() if e.name in expected)
    assert [name for _, name in marks] == expected


@pytest.mark.parametrize("fields", [{}, {"num_experts": 2}], ids=["dense", "experts"])
def test_initial_weights_need_nothing_that_megatron_core_drops(monkeypatch, fields):
    """Megatron-Core 0.20 has no ``ShardedTensor.global_slice``."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    expected = build(**fields).state_dict()
    monkeypatch.delattr(ShardedTensor, "global_slice", raising=False)
    weights = {name: value for name, value in build(**fields).state_dict().items() if torch.is_tensor(value)}
    assert any("experts" in name for name in weights) == bool(fields)
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def test_the_configuration_has_nothing_deprecated():
    from mesh_megatron.model.transformer_config import transformer_config

    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        transformer_config(ModelConfig())
