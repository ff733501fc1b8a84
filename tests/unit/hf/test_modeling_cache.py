"""Cached generation equals the uncached forward: batched, left-padded, ragged, dynamic and static."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from mesh_megatron.hf.configuration_mesh import SCHEMES

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95}


def stepwise(model, ids, mask, cuts, cache, position_ids=None):
    """Logits of all positions, computed in pieces that end at ``cuts``."""
    pieces, start = [], 0
    for end in [*cuts, ids.shape[1]]:
        out = model(
            ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if position_ids is None else position_ids[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        pieces.append(out.logits)
        start = end
    return torch.cat(pieces, dim=1)


def make_cache(kind, model):
    return (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=16)
    )


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("loops", [1, 2, 3, 4])
def test_cached_logits_equal_uncached_at_every_position(make_model, ids, left_padding, loops, kind, attention):
    model = make_model(num_loops=loops)
    model.set_attn_implementation(attention)
    for mask in (None, left_padding):
        full = model(ids, attention_mask=mask, use_cache=False).logits
        assert torch.isfinite(full).all()
        kept = slice(None) if mask is None else mask.bool()
        for cuts in (range(1, 12), [5, 6, 10], [8]):
            cache = make_cache(kind, model)
            cached = stepwise(model, ids, mask, cuts, cache)
            torch.testing.assert_close(cached[kept], full[kept], rtol=0, atol=2e-5)
            assert len(cache.layers) == 1 + 2 * loops + 1
            assert all(layer.get_seq_length() == 12 for layer in cache.layers)


@torch.no_grad()
@pytest.mark.parametrize("recurrence", SCHEMES)
def test_every_scheme_is_cached_rightly(make_model, ids, left_padding, recurrence):
    model = make_model(recurrence=recurrence, num_loops=3, share_core=recurrence != "residual")
    full = model(ids, attention_mask=left_padding, use_cache=False).logits
    cached = stepwise(model, ids, left_padding, range(6, 12), DynamicCache(config=model.config))
    kept = left_padding.bool()
    torch.testing.assert_close(cached[kept], full[kept], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "backbone",
    [
        {"num_key_value_heads": 2, "normalization": "RMSNorm", "swiglu": True, "linear_bias": False},
        {"parallel_residual": False, "rotary_percent": 1.0, "num_prelude_layers": 0},
        {"router_gate": "sigmoid", "router_input": "rmsnorm", "router_scale": 0.5, "router_temperature": 2.0},
        {"loop_lora_rank": 3, "sandwich_norm": True, "per_loop_norms": True},
        {"share_kv_across_loops": True, "num_loops": 3, "num_key_value_heads": 2, "qk_layernorm": True},
    ],
)
def test_backbones_are_cached_rightly(make_model, ids, left_padding, backbone):
    model = make_model(**backbone)
    full = model(ids, attention_mask=left_padding, use_cache=False).logits
    cached = stepwise(model, ids, left_padding, range(4, 12), DynamicCache(config=model.config))
    kept = left_padding.bool()
    torch.testing.assert_close(cached[kept], full[kept], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(make_model, ids, left_padding, side):
    model = make_model(num_loops=3)
    mask = left_padding if side == "left" else left_padding.flip(1)
    batch = model(ids, attention_mask=mask).logits
    for row, kept in enumerate(mask.bool()):
        alone = model(ids[row, kept][None]).logits[0]
        torch.testing.assert_close(batch[row, kept], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_given_positions_are_used(make_model, ids):
    model = make_model()
    spread = torch.arange(12)[None] * 2
    mask = torch.ones_like(ids)
    full = model(ids, attention_mask=mask, position_ids=spread, use_cache=False).logits
    assert (full - model(ids).logits).abs().max() > 1e-3
    cached = stepwise(model, ids, mask, range(3, 12), DynamicCache(config=model.config), spread.expand(3, -1))
    torch.testing.assert_close(cached, full, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_loops_that_share_keys_have_one_entry_a_layer(make_model, ids, left_padding, kind):
    """Whatever the number of loops, which may change while a cache is kept."""
    model = make_model(num_loops=3, share_kv_across_loops=True)
    full = model(ids, attention_mask=left_padding, use_cache=False).logits
    cache, kept = make_cache(kind, model), left_padding.bool()
    cached = stepwise(model, ids, left_padding, [5, 6, 10], cache)
    torch.testing.assert_close(cached[kept], full[kept], rtol=0, atol=2e-5)
    assert len(cache.layers) == len(model.model.attentions) == model.config.num_hidden_layers == 1 + 2 + 1
    assert all(layer.get_seq_length() == 12 for layer in cache.layers)
    model.set_num_loops(5)
    longer = stepwise(model, ids, left_padding, range(4, 12), make_cache(kind, model))
    other = model(ids, attention_mask=left_padding, use_cache=False).logits
    torch.testing.assert_close(longer[kept], other[kept], rtol=0, atol=2e-5)
    assert not torch.allclose(other, full, atol=1e-3)


@pytest.mark.parametrize("loops", [1, 2, 3, 4])
@pytest.mark.parametrize("how", [{"do_sample": False}, SAMPLING], ids=["greedy", "sampled"])
def test_generation_with_and_without_cache(make_model, ids, left_padding, loops, how):
    model = make_model(num_loops=loops)
    texts = []
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(5)
        options = {"max_new_tokens": 8, "pad_token_id": 0, **how, **cache}
        texts.append(model.generate(ids, attention_mask=left_padding, **options))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    if how == {"do_sample": False}:
        for row, kept in enumerate(left_padding.bool()):
            alone = model.generate(ids[row, kept][None], max_new_tokens=8, do_sample=False, pad_token_id=0)
            assert torch.equal(alone[0, -8:], texts[0][row, -8:])


def test_standard_ways_to_generate(make_model, ids):
    model = make_model(num_loops=3)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(ids, **options)
    beams = model.generate(ids, num_beams=3, num_return_sequences=2, **options)
    assert beams.shape == (6, 18)
    assert torch.equal(beams, model.generate(ids, num_beams=3, num_return_sequences=2, use_cache=False, **options))
    one = greedy[:1, :12]
    assert torch.equal(model.generate(one, prompt_lookup_num_tokens=3, **options), model.generate(one, **options))
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **options), greedy)
    unlike = model.generate(ids, repetition_penalty=5.0, no_repeat_ngram_size=2, **options)
    assert unlike.shape == greedy.shape and not torch.equal(unlike, greedy)


@torch.no_grad()
@pytest.mark.parametrize("prelude", [0, 1])
def test_keeping_only_the_last_loop(make_model, ids, left_padding, prelude):
    """Exact for tokens computed together; later tokens see the last loop's keys and values in every loop."""
    model = make_model(num_loops=3, num_prelude_layers=prelude)
    full = model(ids, attention_mask=left_padding, use_cache=False).logits
    model.config.kv_cache_loops = "last"
    cache = DynamicCache(config=model.config)
    at_once = model(ids, attention_mask=left_padding, past_key_values=cache).logits
    kept = left_padding.bool()
    torch.testing.assert_close(at_once[kept], full[kept], rtol=0, atol=1e-5)
    assert len(cache.layers) == prelude + 2 + 1
    assert all(layer.get_seq_length() == 12 for layer in cache.layers)
    approximate = stepwise(model, ids, left_padding, range(6, 12), DynamicCache(config=model.config))
    torch.testing.assert_close(approximate[:, :6][kept[:, :6]], full[:, :6][kept[:, :6]], rtol=0, atol=1e-5)
    assert 1e-3 < (approximate[:, 6:] - full[:, 6:]).abs().max() < full.abs().max()
    beams = model.generate(ids, num_beams=2, max_new_tokens=3, pad_token_id=0)
    assert beams.shape == (3, 15)
    with pytest.raises(ValueError, match="dynamic cache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_shared_keys_keep_their_gradients_where_layers_are_computed_again(make_model, ids, reentrant):
    """Or are refused by name: a reentrant checkpoint computes the first loop without a graph."""
    model = make_model(num_loops=3, share_kv_across_loops=True).train()
    options = None if reentrant is None else {"use_reentrant": reentrant}

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if reentrant:
        with pytest.raises(ValueError, match="share_kv_across_loops: reentrant gradient checkpointing"):
            gradients()
        return
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_keeping_only_the_last_loop_needs_entries_that_can_be_cropped(make_model, ids):
    class QuantizedLayer(DynamicLayer):
        """Stands for transformers' own, which need libraries that compress what is written."""

    model = make_model(kv_cache_loops="last")
    cache = DynamicCache(config=model.config)
    cache.layers = [QuantizedLayer() for _ in cache.layers]
    with pytest.raises(ValueError, match="needs a plain dynamic cache: drop cache_implementation"):
        model(ids, past_key_values=cache)


def test_a_cache_is_not_extended_twice(make_model, ids):
    """By layers that gradient checkpointing runs again."""
    model = make_model().train()
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="past_key_values: gradient checkpointing runs layers twice"):
        model(ids[:, 6:], past_key_values=cache)
    empty = DynamicCache(config=model.config)
    model(ids, past_key_values=empty, labels=ids).loss.backward()
    assert empty.get_seq_length() == 0
    assert model.model.core[0].mlp.dense_h_to_4h.weight.grad.abs().max() > 0
