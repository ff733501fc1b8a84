"""Names, shapes and configurations on both sides."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hf_checkpoints import VOCABULARY, random_tensors, tiny

from mesh_megatron.hf.convert import StateDictAdapter, from_hf_config, reason_not_native, to_hf_config
from mesh_megatron.hf.modeling_mesh import MeshForCausalLM

MODELS = [
    tiny(),
    tiny(layout="3", recurrence="vanilla"),
    tiny(layout="1+2+2+1", recurrence="vanilla+mesh", num_memory_slots=7),
    tiny(layout="0+2R3+0", recurrence="dynamic", num_query_groups=2, kv_channels=16),
    tiny(recurrence="static", normalization="RMSNorm", swiglu=True, disable_bias_linear=True),
    tiny(recurrence="base", qk_layernorm=True, num_query_groups=2),
    tiny(recurrence="base", use_rope_scaling=True, rope_scaling_factor=32.0, hidden_dropout=0.1, attention_dropout=0.2),
    tiny(recurrence="base", rotary_seq_len_interpolation_factor=2.0),
    tiny(layout="3", recurrence="vanilla", use_rope_scaling=True, hidden_dropout=0.1),
    tiny(disable_bias_linear=True, add_qkv_bias=True),
    tiny(recurrence="residual", qk_layernorm=True, normalization="RMSNorm"),
    tiny(recurrence="anchor", untie_embeddings_and_output_weights=False, parallel_residual=False),
]


def adapter(model, native=False):
    return StateDictAdapter(model, VOCABULARY, native)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.layout} {model.recurrence}")
def test_names_and_shapes_are_the_models(model):
    convert = adapter(model)
    built = MeshForCausalLM(to_hf_config(model, VOCABULARY, None, native=False))
    expected = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    assert {convert.names[key]: shape for key, shape in convert.shapes.items()} == expected
    for key, tensor in random_tensors(model).items():
        name, exported = convert.to_hf(key, tensor)
        back, again = convert.from_hf(name, exported)
        assert back == key and torch.equal(again, tensor)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.layout} {model.recurrence}")
def test_configurations_both_ways(model):
    """Settings that training fixes survive the round trip; initial routers and unpadded vocabularies do not."""
    config = to_hf_config(model, VOCABULARY, 3, native=False)
    again, native = from_hf_config(config.to_dict(), "here")
    assert not native
    normal = {"padded_vocab_size": VOCABULARY, "max_position_embeddings": model.seq_length}
    assert again == dataclasses.replace(model, **normal)
    assert config.eos_token_id == 3


def test_plain_models_are_native_gpt_neox():
    model = tiny(layout="3", recurrence="vanilla")
    assert reason_not_native(model) is None
    config = to_hf_config(model, VOCABULARY, 3, native=True)
    assert config.model_type == "gpt_neox" and config.num_hidden_layers == 3
    again, native = from_hf_config(config.to_dict(), "here")
    assert native and again.layout == "3" and again.recurrence == "vanilla"
    assert again.embedding_scaling is False, "the scale is in the exported matrix"
    assert reason_not_native(tiny(layout="1+2R1+1", recurrence="base")) is None, "a core that runs once"
    name, scaled = adapter(model, native=True).to_hf("embedding.word_embeddings.weight", torch.ones(VOCABULARY, 32))
    assert name == "gpt_neox.embed_in.weight"
    torch.testing.assert_close(scaled, torch.full((VOCABULARY, 32), 32**0.5))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (tiny(), "--recurrence mesh"),
        (tiny(recurrence="base"), "runs its core 2 times"),
        (tiny(layout="3", recurrence="vanilla", swiglu=True), "layers"),
        (tiny(layout="3", recurrence="vanilla", num_query_groups=2), "attention heads"),
        (tiny(layout="3", recurrence="vanilla", qk_layernorm=True), "normalises queries and keys"),
        (tiny(layout="3", recurrence="vanilla", untie_embeddings_and_output_weights=False), "output matrix"),
    ],
)
def test_why_a_model_is_not_native(model, reason):
    assert reason in reason_not_native(model)


def test_only_routers_and_coefficients_stay_float32():
    model = tiny()
    for key, tensor in random_tensors(model).items():
        _, exported = adapter(model).to_hf(key, tensor, torch.bfloat16)
        assert exported.dtype == (torch.float32 if key.startswith("recurrence.") else torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda found: found.pop("model.core.1.attention.dense.bias"), "missing model.core.1.attention.dense.bias"),
        (lambda found: found.update({"model.core.2.x": (1,)}), "holds model.core.2.x"),
        (lambda found: found.update({"lm_head.weight": (99, 32)}), r"lm_head.weight is \[99, 32\].*needs \[128, 32\]"),
    ],
)
def test_tensors_that_do_not_fit(change, complaint):
    convert = adapter(tiny())
    found = {convert.names[key]: shape for key, shape in convert.shapes.items()}
    assert convert.sources(found, "here") == convert.names
    change(found)
    with pytest.raises(ValueError, match=f"here: {complaint}"):
        convert.sources(found, "here")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"model_type": "llama"}, "'llama' cannot be imported"),
        ({}, "None cannot be imported"),
        ({"model_type": "gpt_neox", "hidden_act": "gelu_fast"}, "hidden_act 'gelu_fast'"),
        ({"model_type": "gpt_neox", "hidden_size": "wide"}, "does not describe a gpt_neox"),
        ({"model_type": "mesh", "recurrence": "spiral"}, "does not describe a mesh: recurrence 'spiral'"),
        ({"model_type": "gpt_neox", "attention_bias": False}, "attention_bias False"),
        (
            {"model_type": "gpt_neox", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "'rope_type': 'dynamic', 'factor': 2.0} cannot be trained here",
        ),
        (
            {
                "model_type": "mesh",
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 4096,
                    "rope_theta": 1e4,
                },
            },
            "'original_max_position_embeddings': 4096} cannot be trained here",
        ),
    ],
)
def test_what_cannot_be_imported(content, complaint):
    with pytest.raises(ValueError, match=f"here: .*{complaint}"):
        from_hf_config(content, "here")


def test_published_gpt_neox_names():
    """Older files call the output matrix embed_out and hold buffers that are no parameters."""
    model = tiny(layout="2", recurrence="vanilla", embedding_scaling=False)
    convert = adapter(model, native=True)
    found = {convert.names[key]: shape for key, shape in convert.shapes.items()}
    buffers = {f"gpt_neox.layers.0.{name}": (1,) for name in ("attention.bias", "attention.rotary_emb.inv_freq")}
    assert "embed_out.weight" in found
    assert convert.sources(found | buffers, "here")["output_layer.weight"] == "embed_out.weight"
    found["lm_head.weight"] = found.pop("embed_out.weight")
    assert convert.sources(found, "here")["output_layer.weight"] == "lm_head.weight"
    assert convert.from_hf("lm_head.weight", torch.ones(1))[0] == "output_layer.weight"
