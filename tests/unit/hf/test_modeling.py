"""The exported model against the paper's equations, against gpt_neox of transformers, and against itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loop_scheme_equations import LOOP_SCHEMES
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, StaticCache

from mesh_megatron.hf.configuration_mesh import SCHEMES, MeshConfig
from mesh_megatron.hf.modeling_mesh import MeshForCausalLM, MeshModel

BACKBONES = {
    "sequential": {"parallel_residual": False},
    "llama-like": {
        "normalization": "RMSNorm",
        "swiglu": True,
        "linear_bias": False,
        "rotary_percent": 1.0,
        "parallel_residual": False,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    },
    "tied, wide heads": {"tie_word_embeddings": True, "head_dim": 16, "num_key_value_heads": 1},
    "no prelude, no coda": {"num_prelude_layers": 0, "num_coda_layers": 0},
    "unshared": {"share_core": False},
    "sandwich norms": {"sandwich_norm": True, "per_loop_norms": True},
    "differences of loops": {"loop_lora_rank": 3, "swiglu": True},
    "shared keys": {"share_kv_across_loops": True, "num_key_value_heads": 2, "qk_layernorm": True},
}


class PaperSteps:
    """The blocks of one model as plain functions of a state [B, S, D], for specifications written out below."""

    def __init__(self, model: MeshModel, ids: torch.Tensor):
        self.model, config = model, model.config
        positions = torch.arange(ids.shape[1])[None]
        causal = torch.full((ids.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
        self.inputs = {
            "attention_mask": causal,
            "rotary": model.rotary(positions, torch.float32),
            "past_key_values": None,
            "computed": model.attentions[0],
            "keep_cache": True,
        }
        self.embedding = model.embed_in(ids) * config.hidden_size**0.5

    def run(self, layers, state: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            state = layer(state, **self.inputs)
        return state

    def prelude(self, state: torch.Tensor) -> torch.Tensor:
        return self.run(self.model.prelude, state)

    def core(self, loop: int, state: torch.Tensor) -> torch.Tensor:
        config = self.model.config
        if config.loop_norm:
            rms = (state.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt()
            state = state / rms * self.model.recurrence.loop_norm.weight
        if config.loop_embedding:
            state = state + self.model.recurrence.loop_embedding.weight[loop]
        first = 0 if config.share_core else loop * config.num_core_layers
        layers = self.model.core[first : first + config.num_core_layers]
        if not config.per_loop_norms:
            return self.run(layers, state)
        kept = [(norm, norm.weight.clone()) for layer in layers for norm in self.norms(layer)]
        for norm, weight in kept:  # each loop as if it were the first
            norm.weight[0] = weight[loop]
        state = self.run(layers, state)
        for norm, weight in kept:
            norm.weight.copy_(weight)
        return state

    @staticmethod
    def norms(layer):
        return layer.input_layernorm, layer.post_attention_layernorm


def final_logits(model: MeshForCausalLM, steps: PaperSteps, state: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.model.final_layer_norm(steps.run(model.model.coda, state)))


def slot_form(model: MeshForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Section 3.2 word for word, with the memory built: m_b += w_b y_c, s_{c+1} = sum_b r_b m_b."""
    steps, config = PaperSteps(model.model, ids), model.config
    slots, loops = config.num_memory_slots, config.num_loops
    state = steps.embedding
    memory = torch.stack([state] + [torch.zeros_like(state)] * (slots - 1))
    for cycle in range(loops + 1):
        router = model.model.recurrence.routers[cycle]
        scale = 1 if config.router_scale is None else router.scale
        logits = scale * (router_input(config, state) @ router.weight.T) + router.bias
        halves = (half / config.router_temperature for half in (logits[..., :slots], logits[..., slots:]))
        write, read = (half.sigmoid() if config.router_gate == "sigmoid" else half.softmax(-1) for half in halves)
        output = steps.prelude(state) if cycle == 0 else steps.core(cycle - 1, state)
        for slot in range(slots):
            memory[slot] = memory[slot] + write[..., slot, None] * output
        state = sum(read[..., slot, None] * memory[slot] for slot in range(slots))
    return final_logits(model, steps, state)


def router_input(config: MeshConfig, state: torch.Tensor) -> torch.Tensor:
    if config.router_input == "rmsnorm":
        return state / (state.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return F.layer_norm(state, state.shape[-1:]) if config.router_input == "normalized" else state


def additive_form(model: MeshForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Section 3.1 and Table 4: the next state of every additive scheme, one line each."""
    steps, recurrence = PaperSteps(model.model, ids), model.model.recurrence
    h_emb = steps.embedding
    equation = LOOP_SCHEMES.get(model.config.recurrence)
    if equation is not None:
        blocks = [steps.prelude, *(partial(steps.core, loop) for loop in range(model.config.num_loops))]
        return final_logits(
            model, steps, LOOP_SCHEMES[model.config.recurrence](recurrence, h_emb, blocks, model.config)
        )
    h0 = h = steps.prelude(h_emb)
    for t in range(model.config.num_loops):
        f, a1, a2, a3 = steps.core(t, h), 0, 0, 0
        if model.config.recurrence == "static":
            a1, a2, a3 = recurrence.coefficients
        elif model.config.recurrence == "dynamic":
            a1, a2, a3 = (h @ recurrence.router.weight.T + recurrence.router.bias).split(1, dim=-1)
        h = {
            "base": f,
            "residual": f + h,
            "anchor": f + h0,
            "anchor_emb": f + h_emb,
            "residual+anchor": f + h + h0,
            "anchor+anchor_emb": f + h0 + h_emb,
            "residual+anchor+anchor_emb": f + h + h0 + h_emb,
            "static": a1 * f + a2 * h0 + a3 * h_emb,
            "dynamic": a1 * f + a2 * h0 + a3 * h_emb,
        }[model.config.recurrence]
    return final_logits(model, steps, h)


@torch.no_grad()
@pytest.mark.parametrize("loops", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_core": False},
        {"router_input": "normalized"},
        {"router_gate": "sigmoid", "router_input": "rmsnorm", "router_scale": 0.5, "router_temperature": 2.0},
        {"num_memory_slots": 1},
    ],
)
def test_mesh_is_the_slot_form(make_model, ids, loops, changes):
    model = make_model(num_loops=loops, **changes)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, slot_form(model, ids), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("share_core", [True, False])
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "mesh"])
def test_additive_schemes_are_their_equations(make_model, ids, scheme, share_core):
    model = make_model(recurrence=scheme, num_loops=3, share_core=share_core)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, additive_form(model, ids), rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["residual", "hyper", "attend"])
def test_the_input_of_the_core_is_its_equation(make_model, ids, scheme):
    options = {"loop_norm": True, "loop_embedding": True, "per_loop_norms": True, "normalization": "RMSNorm"}
    model = make_model(recurrence=scheme, num_loops=3, **options)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, additive_form(model, ids), rtol=0, atol=2e-5)


ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("parallel_residual", "rope"), [(True, name) for name in ROPES] + [(False, "default")])
def test_a_plain_model_is_gpt_neox(make_model, ids, left_padding, parallel_residual, rope):
    rope = ROPES[rope] | {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    plain = {"num_prelude_layers": 2, "num_core_layers": 0, "num_loops": 0, "num_coda_layers": 2, "share_core": False}
    ours = make_model(
        recurrence="base", embedding_scaling=False, parallel_residual=parallel_residual, rope_parameters=rope, **plain
    )
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=101, hidden_size=32, num_attention_heads=4, num_hidden_layers=4, intermediate_size=128,
            max_position_embeddings=64, use_parallel_residual=parallel_residual,
            rope_parameters=rope,
        )
    ).eval()  # fmt: skip
    renamed = {}
    for name, tensor in ours.state_dict().items():
        for segment, shift in (("prelude", 0), ("coda", 2)):
            for layer in range(2):
                name = name.replace(f"model.{segment}.{layer}.", f"gpt_neox.layers.{layer + shift}.")
        renamed[name.replace("model.", "gpt_neox.")] = tensor
    theirs.load_state_dict(renamed)
    for mask in (None, left_padding):
        a, b = (model(ids, attention_mask=mask, labels=ids) for model in (ours, theirs))
        kept = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(a.logits[kept], b.logits[kept], rtol=0, atol=1e-5)
        torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=1e-5 if mask is None else 1)


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("recurrence", ["mesh", "residual+anchor"])
def test_backbone_options_keep_causality_and_attention_kinds_agree(make_model, ids, backbone, recurrence):
    model = make_model(recurrence=recurrence, **BACKBONES[backbone])
    logits = model(ids).logits
    changed = ids.clone()
    changed[:, 8:] = 7
    torch.testing.assert_close(model(changed).logits[:, :8], logits[:, :8], rtol=0, atol=1e-5)
    assert (model(changed).logits[:, 8:] - logits[:, 8:]).abs().max() > 0.1
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_hidden_and_loop_states(make_model, ids):
    model = make_model(num_loops=3)
    plain = model(ids)
    assert plain.hidden_states is None and plain.loop_states is None
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_computed_layers + 1 == 9
    states = out.loop_states
    assert len(states) == 3 + 3
    torch.testing.assert_close(states[0], model.model.embed_in(ids) * 32**0.5)
    torch.testing.assert_close(out.hidden_states[0], states[0])
    torch.testing.assert_close(model.model.final_layer_norm(states[-1]), out.hidden_states[-1])
    write, read = model.model.recurrence.route(0, states[0])
    first_output = out.hidden_states[1]  # the prelude is one layer
    expected = read[..., :1] * states[0] + (read * write).sum(-1, keepdim=True) * first_output
    torch.testing.assert_close(states[1], expected)


def test_attentions_of_every_computed_layer(make_model, ids):
    model = make_model()
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    assert len(attentions) == 6
    torch.testing.assert_close(attentions[3].sum(-1), torch.ones(3, 4, 12))


def test_embeddings_as_input_and_loss(make_model, ids):
    model = make_model()
    out = model(ids, labels=ids)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, out.logits)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    with pytest.raises(ValueError, match="either"):
        model()


def test_gradient_checkpointing_gives_the_same_gradients(make_model, ids):
    model = make_model(num_loops=3).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert gradients[0]["model.recurrence.routers.3.weight"].abs().max() > 0


@torch.no_grad()
def test_routers_stay_float32_under_autocast(make_model, ids):
    model = make_model()
    embedding = model.model.embed_in(ids)
    exact = model.model.recurrence.route(0, embedding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.model.recurrence.route(0, embedding)
        assert model(ids).logits.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(exact, mixed, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("recurrence", ["mesh", pytest.param("dynamic", marks=pytest.mark.full)])
def test_traces_into_one_graph(make_model, ids, recurrence):
    """Requirements of compiled generation with a static cache."""
    model = make_model(recurrence=recurrence)
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
    cache = StaticCache(config=model.config, max_cache_len=12)
    model(ids[:, :11], past_key_values=cache)
    torch.testing.assert_close(compiled(ids[:, 11:], past_key_values=cache).logits, expected[:, 11:])


def test_initial_weights_follow_the_paper():
    torch.manual_seed(0)
    model = MeshForCausalLM(MeshConfig(vocab_size=64, hidden_size=256, num_attention_heads=4, num_loops=3))
    scaled = 0.02 / (2 * 16) ** 0.5
    assert model.model.core[0].attention.dense.weight.std().item() == pytest.approx(scaled, rel=0.03)
    assert model.model.core[0].mlp.dense_4h_to_h.weight.std().item() == pytest.approx(scaled, rel=0.03)
    assert model.model.core[0].attention.query_key_value.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for scheme, name in (("static", "coefficients"), ("dynamic", "router.bias")):
        model = MeshForCausalLM(MeshConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, recurrence=scheme))
        assert model.model.recurrence.get_parameter(name).tolist() == [1.0, 0.0, 0.0]


def test_bad_configurations():
    with pytest.raises(ValueError, match="recurrence 'loop' is not one of base"):
        MeshConfig(recurrence="loop")
    with pytest.raises(ValueError, match="kv_cache_loops 'first'"):
        MeshConfig(kv_cache_loops="first")
    with pytest.raises(ValueError, match="num_key_value_heads 5"):
        MeshConfig(num_attention_heads=12, num_key_value_heads=5)


def test_frequencies_of_the_trainer_are_those_of_its_export():
    """Those of Llama 3.1 by its published rule: low frequencies divided, high ones kept, a blend between."""
    import math

    from mesh_megatron.config.model import ModelConfig
    from mesh_megatron.hf.convert import to_hf_config
    from mesh_megatron.hf.modeling_mesh import MeshRotary

    model = ModelConfig(hidden_size=256, num_attention_heads=4, rotary_percent=1.0, use_rope_scaling=True)
    found, factor = MeshRotary(to_hf_config(model, 128, None, native=False)).frequencies(torch.device("cpu"))
    plain = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    share = ((8192 * plain / (2 * math.pi) - 1) / 3).clamp(0, 1)
    torch.testing.assert_close(found, plain * (share + (1 - share) / 8))
    assert factor == 1.0 and (share == 0).any() and (share == 1).any() and ((share > 0) & (share < 1)).any()
