"""Tokens that leave the core early: each by itself, with a cache that stays right."""

from __future__ import annotations

import pytest
import torch
from hf_models import make_config
from test_modeling_cache import stepwise
from transformers import DynamicCache, StaticCache

from mesh_megatron.hf.modeling_mesh import Exits

SCHEMES = ["base", "residual+anchor+anchor_emb", "static", "dynamic", "adapter", "decay", "mesh", "hyper", "attend"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
NEVER, ALWAYS = 1e-30, 1e30


def let_leave(model, criterion: str, share: float, ids: torch.Tensor) -> None:
    """Set a threshold at which about ``share`` of the tokens leave after the second loop (by ``gate``, or before)."""
    gate = criterion == "gate"
    model.config.exit_criterion, model.config.exit_threshold = criterion, 1.0 if gate else NEVER
    seen = []
    original, difference = Exits.leave, Exits.difference

    def leave(self, loop, state):
        left = original(self, loop, state)
        if gate and loop == 1:
            seen.append(1 - self.before.exp())
        return left

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exits, "leave", leave)
        patch.setattr(Exits, "difference", lambda self, after: seen.append(difference(self, after)) or seen[-1])
        model(ids)
    measured = seen[0].flatten().sort().values
    place = int((1 - share if gate else share) * len(measured))
    model.config.exit_threshold = float(measured[place - 1 : place + 1].mean())  # between two, away from rounding


@torch.no_grad()
@pytest.mark.parametrize("criterion", ["change", "kl"])
@pytest.mark.parametrize("recurrence", SCHEMES)
def test_all_or_none_leave(make_model, ids, recurrence, criterion):
    """If all leave, the model has two loops; if none does, all."""
    model = make_model(recurrence=recurrence, num_loops=4)
    logits = model(ids).logits
    model.config.exit_criterion, model.config.exit_threshold = criterion, NEVER
    out = model(ids)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-6)
    assert out.exit_loops.eq(4).all()
    model.config.exit_threshold = ALWAYS
    early = model(ids)
    assert early.exit_loops.eq(2).all()
    model.config.exit_criterion, model.config.exit_threshold = None, 0.0
    model.set_num_loops(2)
    torch.testing.assert_close(early.logits, model(ids).logits, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("criterion", ["change", "kl", "gate"])
@pytest.mark.parametrize("recurrence", ["anchor", "mesh", "hyper-dynamic", "attend"])
def test_a_token_is_its_equation(make_model, ids, recurrence, criterion):
    """The last token of a text, computed alone from the keys and values that the tokens before it left behind."""
    model = make_model(recurrence=recurrence, num_loops=4, exit_gate=criterion == "gate")
    let_leave(model, criterion, 0.5, ids)
    full = model(ids)
    assert len(full.exit_loops.unique()) > 1
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache)
    depth, first = model.config.num_core_layers, model.config.num_prelude_layers
    for row, loops in enumerate(full.exit_loops[:, :-1].tolist()):  # entries of loops after the last are copies of it
        for layer in range(depth):
            entries = [cache.layers[first + loop * depth + layer] for loop in range(4)]
            for place, ran in enumerate(loops):
                for later in range(ran, 4):
                    assert torch.equal(entries[later].keys[row, :, place], entries[ran - 1].keys[row, :, place])
                    assert torch.equal(entries[later].values[row, :, place], entries[ran - 1].values[row, :, place])
    for row, loops in enumerate(full.exit_loops[:, -1].tolist()):  # a token that leaves runs a model of so many loops
        shorter = make_model(recurrence=recurrence, num_loops=4, exit_gate=criterion == "gate")
        shorter.load_state_dict(model.state_dict())
        shorter.set_num_loops(loops)
        part = DynamicCache(config=shorter.config)
        for layer in range(first):
            part.update(cache.layers[layer].keys[[row]], cache.layers[layer].values[[row]], layer)
        for entry in range(first, first + loops * depth):
            part.update(cache.layers[entry].keys[[row]], cache.layers[entry].values[[row]], entry)
        for layer in range(model.config.num_coda_layers):
            of_coda = cache.layers[-model.config.num_coda_layers + layer]
            part.update(of_coda.keys[[row]], of_coda.values[[row]], first + loops * depth + layer)
        alone = shorter(ids[[row], -1:], past_key_values=part).logits[0, -1]
        torch.testing.assert_close(full.logits[row, -1], alone, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("criterion", ["change", "kl", "gate"])
@pytest.mark.parametrize(
    "changes",
    [{"recurrence": "base"}, {"recurrence": "mesh"}, {"recurrence": "base", "share_kv_across_loops": True}],
    ids=str,
)
def test_cached_equals_uncached(make_model, ids, left_padding, changes, criterion):
    model = make_model(num_loops=4, exit_gate=criterion == "gate", **changes)
    let_leave(model, criterion, 0.4, ids)
    full = model(ids, attention_mask=left_padding, use_cache=False)
    kept = left_padding.bool()
    assert len(full.exit_loops[kept].unique()) > 1
    for cuts in (range(1, 12), [5, 6, 10]):
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
            cached = stepwise(model, ids, left_padding, cuts, cache)
            torch.testing.assert_close(cached[kept], full.logits[kept], rtol=0, atol=2e-5)
            assert all(layer.get_seq_length() == 12 for layer in cache.layers)
    for row, mine in enumerate(kept):  # a sequence does not depend on the others of its batch
        alone = model(ids[row, mine][None])
        torch.testing.assert_close(alone.logits[0], full.logits[row, mine], rtol=0, atol=1e-5)
        assert torch.equal(alone.exit_loops[0], full.exit_loops[row, mine])


@pytest.mark.parametrize("recurrence", ["dynamic", "mesh"])
def test_generation(make_model, ids, left_padding, recurrence):
    model = make_model(recurrence=recurrence, num_loops=4)
    with torch.no_grad():
        let_leave(model, "change", 0.5, ids)
    threshold, options = model.config.exit_threshold, {"attention_mask": left_padding, **GREEDY}
    set_in_config = model.generate(ids, **options)
    model.config.exit_criterion, model.config.exit_threshold = None, 0.0
    usual = model.generate(ids, **options)
    exits = {"exit_criterion": "change", "exit_threshold": threshold}
    texts = [model.generate(ids, **options, **exits, **cache) for cache in ({}, {"use_cache": False})]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], set_in_config)
    assert torch.equal(model.generate(ids, **options), usual)
    for row, mine in enumerate(left_padding.bool()):
        alone = model.generate(ids[row, mine][None], **GREEDY, **exits)
        assert torch.equal(alone[0, -6:], texts[0][row, -6:])


def test_a_call_takes_what_it_is_not_given_from_the_configuration(make_model, ids):
    model = make_model(num_loops=4)
    model.config.exit_criterion, model.config.exit_threshold = "change", NEVER
    seen = []
    model.model.register_forward_pre_hook(
        lambda *_: seen.append((model.config.exit_criterion, model.config.exit_threshold))
    )
    for exits in ({"exit_threshold": ALWAYS}, {"exit_criterion": "change"}, {}):
        model.generate(ids, **{**GREEDY, "max_new_tokens": 1}, **exits)
    assert seen == [("change", ALWAYS), ("change", NEVER), ("change", NEVER)]
    with pytest.raises(ValueError, match="exit_criterion 'kl': give exit_threshold with it"):
        model.generate(ids, **GREEDY, exit_criterion="kl")
    assert (model.config.exit_criterion, model.config.exit_threshold) == ("change", NEVER)


@torch.no_grad()
@pytest.mark.parametrize("recurrence", ["base", "decay", "mesh"])
def test_tokens_leave_where_the_gate_says(make_model, ids, recurrence):
    """After the first loop at which sum_t p_t reaches the threshold; here of tokens that see no other one."""
    model = make_model(recurrence=recurrence, num_loops=4, exit_gate=True)
    tokens, gate = ids.reshape(-1, 1), model.model.recurrence.exit_gate
    still_there, reached = torch.ones(len(tokens)), []
    for loops in range(1, 5):
        model.set_num_loops(loops)
        state = model(tokens, output_hidden_states=True).loop_states[-2][:, 0]  # enters the coda
        leave = torch.sigmoid(state @ gate.weight[0] + gate.bias)
        still_there = still_there * (1 - leave) if loops < 4 else 0 * leave
        reached.append(1 - still_there)
    model.config.exit_criterion = "gate"
    for threshold in (1e-9, 0.3, 0.5, 0.7, 0.9, 1.0):
        model.config.exit_threshold = threshold
        expected = 1 + sum((cumulative < threshold).long() for cumulative in reached)
        assert torch.equal(model(tokens).exit_loops[:, 0], expected)
    assert len({int(loops) for cumulative in reached for loops in cumulative.mul(100)}) > 10


@torch.no_grad()
def test_loops_that_no_token_runs_are_not_computed(make_model, ids):
    model = make_model(num_loops=6)
    model.config.exit_criterion, model.config.exit_threshold = "change", ALWAYS
    calls = []
    model.model.core[0].register_forward_hook(lambda *_: calls.append(1))
    model(ids)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "exits", "words"),
    [
        ({}, {"exit_criterion": "door", "exit_threshold": 0.5}, "exit_criterion 'door' is neither 'change' nor 'kl'"),
        ({}, {"exit_criterion": "gate", "exit_threshold": 0.5}, "exit_criterion 'gate' needs a trained exit gate"),
        ({"exit_gate": True}, {"exit_criterion": "gate", "exit_threshold": 1.5}, "is a probability: use at most 1"),
        ({}, {"exit_criterion": "change"}, "exit_criterion 'change': give exit_threshold with it"),
        ({}, {"exit_criterion": "change", "exit_threshold": 0.0}, "exit_threshold 0.0 must be above 0"),
        ({}, {"exit_threshold": 0.1}, "exit_threshold 0.1 needs an exit_criterion"),
        ({"share_core": False}, {"exit_criterion": "kl", "exit_threshold": 0.1}, "needs a shared core"),
        ({"kv_cache_loops": "last"}, {"exit_criterion": "kl", "exit_threshold": 0.1}, "needs kv_cache_loops 'all'"),
    ],
)
def test_mistakes_name_the_setting(make_model, ids, changes, exits, words):
    model = make_model(**changes)
    with pytest.raises(ValueError, match=words):
        model.generate(ids, **GREEDY, **exits)
    assert model.config.exit_criterion is None


def test_training_is_refused(make_model, ids):
    model = make_model().train()
    model.config.exit_criterion, model.config.exit_threshold = "change", 0.1
    with pytest.raises(ValueError, match="exit_criterion 'change' is for inference"):
        model(ids)


def test_probes_show_exits(one_rank, make_model, ids):
    from mesh_megatron.analysis.exits import ExitProbe
    from mesh_megatron.commands.probe import summary
    from mesh_megatron.hf.loading import LoadedModel

    model = make_model(num_loops=4)
    probe = ExitProbe(LoadedModel(model, None), "change", (NEVER, ALWAYS))
    for row in ids:
        probe.add(row)
    never, always = probe.to_dict()["thresholds"]
    assert (never["loops"], never["shares"]) == (4, [0, 0, 0, 1])
    assert (always["loops"], always["shares"]) == (2, [0, 1, 0, 0])
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(row[None, :-1]).logits[0], row[1:]).item() for row in ids]
    assert never["loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)
    numbers = {"blocks": [], "update_magnitude": {"mean": []}, "loss": {"mean": []}, "samples": 3}
    assert "exits below 1e+30: 2.00 loops" in summary("mesh", numbers | {"exits": probe.to_dict()})
    with pytest.raises(ValueError, match="--exit-criterion change: the model has no shared core"):
        ExitProbe(LoadedModel(make_model(share_core=False), None), "change", (0.1,))


@torch.no_grad()
def test_loops_that_no_token_runs_are_filled_in_order(make_model, ids):
    """As caches need it that fetch the next entry from elsewhere in time."""
    model = make_model(num_loops=5)
    model.config.exit_criterion, model.config.exit_threshold = "change", ALWAYS
    updated, cache = [], DynamicCache(config=model.config)
    update = cache.update
    cache.update = lambda key, value, entry, *rest, **more: (
        updated.append(entry) or update(key, value, entry, *rest, **more)
    )
    model(ids, past_key_values=cache)
    assert updated == list(range(model.config.num_hidden_layers))


def test_layers_and_readout_may_be_on_several_devices():
    """Meta tensors are not mixed with others, and do not tell whether all tokens have left."""
    config = make_config(num_loops=3, exit_gate=True, exit_criterion="change", exit_threshold=0.1)
    exits, key = Exits(config, None, None), torch.zeros(1, 4, 5, 8, device="meta")
    for loop in range(3):
        kept = exits.keys_and_values(1 + loop * config.num_core_layers, key, key)
        assert kept[0].device == key.device
        exits.after(loop, torch.ones(1, 5, 32))
    state = torch.zeros(1, 5, 32, device="meta")
    for config.exit_criterion in ("kl", "gate"):
        gate = None if config.exit_criterion == "kl" else lambda state: torch.zeros(1, 5, 1)
        exits = Exits(config, lambda state: torch.zeros(1, 5, 32), gate)
        for loop in range(2):
            with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
                exits.after(loop, state)
            assert exits.left.device == state.device
