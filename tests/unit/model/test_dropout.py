"""Dropout by hash: as many values as asked, other ones at every place, the same ones whenever they are computed."""

import itertools
import math

import pytest
import torch
from test_mesh_model import VOCABULARY, build

from mesh_megatron.model.dropout import AttentionWeights, Masks, attend, kept

pytestmark = pytest.mark.usefixtures("one_rank")
NUMBERS = torch.arange(2 * 16).view(2, 16)


def masks(numbers: torch.Tensor = NUMBERS, seed: int = 1) -> Masks:
    return Masks.of_pass(numbers, seed, sequence_parallel=False)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_the_share_is_dropped_by_token_and_by_channel(share):
    """Counts lie within five standard deviations of the binomial's mean, in total, in rows and in columns."""
    tokens, width = 1024, 1024
    rows = masks().rows(torch.arange(tokens) + 2**33, "attention", 3)
    dropped = ~kept(rows, width, share)
    for count, values in ((dropped.sum(), tokens * width), (dropped.sum(0), tokens), (dropped.sum(1), width)):
        assert (count - share * values).abs().max() <= 5 * math.sqrt(share * (1 - share) * values)


def test_masks_of_different_places_are_unrelated():
    """Two masks agree in half of their values, whatever differs: seed, layer, place, sample, token; and neighbours."""
    far = NUMBERS + 2**40
    patterns = [
        kept(some.rows(numbers, place, layer), 512, 0.5)
        for some, numbers, place, layer in (
            (masks(), NUMBERS, "attention", 0), (masks(seed=2), NUMBERS, "attention", 0),
            (masks(), NUMBERS, "attention", 1), (masks(), NUMBERS, "feed-forward", 0), (masks(), far, "attention", 0),
        )
    ]  # fmt: skip
    patterns += [patterns[0].roll(1, dims=dim) for dim in (0, 1, 2)]
    for one, other in itertools.combinations(patterns, 2):
        assert abs((one == other).float().mean() - 0.5) < 5 * 0.5 / math.sqrt(one.numel())


def test_part_of_a_state_has_the_masks_of_the_state():
    state = torch.randn(16, 2, 8)
    complete = masks().drop(state, "attention", 3, 0.5)
    part = masks(NUMBERS[1:, 5:9]).after(2).drop(state[5:9, 1:], "attention", 1, 0.5)
    assert torch.equal(part, complete[5:9, 1:])


def test_values_that_stay_keep_the_mean_and_the_gradient():
    state = torch.randn(16, 2, 64, requires_grad=True)
    dropped = masks().drop(state, "embedding", 0, 0.25)
    factor = (dropped / state).detach()
    assert ((factor == 0) | (factor - 4 / 3).abs().lt(1e-5)).all()
    dropped.backward(torch.ones_like(state).transpose(0, 1).contiguous().transpose(0, 1))
    torch.testing.assert_close(state.grad, factor)


@pytest.mark.parametrize("piece", [2**24, 2**10])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_is_its_formula(piece, documents, monkeypatch):
    """Values and gradients of softmax, mask and product written out, in one block and in many."""
    from mesh_megatron.model import dropout

    monkeypatch.setattr(dropout, "_PIECE", piece)
    query, key, value = (torch.randn(2, heads, 16, 8, requires_grad=True) for heads in (4, 2, 2))
    hidden = torch.ones(16, 16, dtype=torch.bool).triu(1)
    if documents:
        hidden = hidden.clone()
        hidden[9:, :9] = True
    how = AttentionWeights.of_layer(masks(), 5, range(4), share=0.3, scale=0.2)
    output = attend(query, key, value, hidden[None, None] if documents else None, how)
    scores = (query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.2).masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1) * kept(how.rows, 16, 0.3) / 0.7
    expected = weights @ value.repeat_interleave(2, dim=1)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(expected)
    found = torch.autograd.grad(output, (query, key, value), direction)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (query, key, value), direction))
    assert not torch.equal(how.rows[:, 0], how.rows[:, 1])
    second = AttentionWeights.of_layer(masks(), 5, range(2, 4), share=0.3, scale=0.2)
    assert torch.equal(second.rows, how.rows[:, 2:])


@pytest.mark.parametrize("loops", [1, 2])
def test_fewer_loops_number_their_layers_as_they_are_computed(loops, monkeypatch):
    seen = []
    original = Masks.rows
    monkeypatch.setattr(
        Masks,
        "rows",
        lambda self, tokens, place, layer: (
            seen.append(self.first_layer + layer),
            original(self, tokens, place, layer),
        )[1],
    )
    model = build(layout="1+2R3+1", attention_dropout=0.5)
    model.set_loops(loops)
    model(torch.randint(VOCABULARY, (2, 16)), None, None, None, NUMBERS)
    assert seen == list(range(2 + 2 * loops))


@pytest.mark.parametrize("layout", ["1+2R3+1", "1+2+2+2+1"])
@pytest.mark.parametrize("kind", ["hidden_dropout", "attention_dropout"])
def test_every_computed_layer_drops_and_evaluation_does_not(kind, layout, monkeypatch):
    """Each computed layer has its own number, the loops of a shared core too."""
    seen = []
    original = Masks.rows

    def rows(self, tokens, place, layer):
        seen.append((place, self.first_layer + layer))
        return original(self, tokens, place, layer)

    monkeypatch.setattr(Masks, "rows", rows)
    model = build(layout=layout, **{kind: 0.5})
    tokens = torch.randint(VOCABULARY, (2, 16))
    dropped = model(tokens, None, None, None, NUMBERS)
    places = ["attention weights"] if kind == "attention_dropout" else ["attention", "feed-forward"]
    expected = [(place, layer) for layer in range(8) for place in places]
    assert seen == [("embedding", 0)] * (kind == "hidden_dropout") + expected
    assert torch.equal(dropped, model(tokens, None, None, None, NUMBERS))
    assert not torch.allclose(dropped, model(tokens, None, None, None, NUMBERS + 32), atol=1e-3)
    plain = build(layout=layout)(tokens)
    torch.testing.assert_close(model(tokens), plain)
    torch.testing.assert_close(model.eval()(tokens, None, None, None, NUMBERS), plain)


@pytest.mark.parametrize("fields", [{}, {"parallel_residual": False, "normalization": "RMSNorm"}], ids=str)
def test_a_layer_is_its_formula(fields):
    from mesh_megatron.model.layer import LayerPass

    """x + d(attn(ln1(x))) + d(mlp(ln2(x))), or one after the other; biases are dropped with their outputs."""
    model = build(layout="2", recurrence="vanilla", hidden_dropout=0.4, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    layer, state = model.coda.layers[0], torch.randn(16, 2, 32)
    rotations, some = model.rotations(state), masks()
    attention, bias = layer.self_attention(layer.input_layernorm(state), None, rotary_pos_emb=rotations)
    attended = state + some.drop(attention if bias is None else attention + bias, "attention", 0, 0.4)
    mlp, bias = layer.mlp(layer.pre_mlp_layernorm(state if not fields else attended))
    expected = attended + some.drop(mlp if bias is None else mlp + bias, "feed-forward", 0, 0.4)
    actual = layer(state, None, rotary_pos_emb=rotations, attention_bias=LayerPass(some))[0]
    torch.testing.assert_close(actual, expected)
