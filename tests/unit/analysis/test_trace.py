"""States recorded by hooks are those that the model computed."""

import pytest
import torch
import torch.nn.functional as F
from probed_models import SCHEMES, mesh_model, plain_model, sequence

from mesh_megatron.analysis.trace import build_tracer
from mesh_megatron.config.layout import Layout

close = torch.testing.assert_close


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("prelude, coda", [(1, 1), (0, 0)])
def test_states_are_the_models_own(scheme: str, prelude: int, coda: int):
    model, ids = mesh_model(recurrence=scheme, num_prelude_layers=prelude, num_coda_layers=coda), sequence()
    trace = build_tracer(model)(ids)
    expected = model(ids[None], output_hidden_states=True).loop_states
    assert len(trace.states) == len(expected) == model.config.num_loops + 3
    assert len(trace.outputs) == model.config.num_loops + 2
    for mine, own in zip(trace.states, expected, strict=True):
        close(mine, own[0], rtol=0, atol=0)


def test_outputs_are_what_blocks_return():
    model, ids = mesh_model(recurrence="base"), sequence()
    trace = build_tracer(model)(ids)
    for output, state in zip(trace.outputs, trace.states[1:], strict=True):
        close(output, state, rtol=0, atol=0)  # of base, every output is the next state
    model = mesh_model(recurrence="residual")
    trace = build_tracer(model)(ids)
    for loop in (1, 2):
        close(trace.outputs[loop] + trace.states[loop], trace.states[loop + 1])


@pytest.mark.parametrize("router_input", ["state", "normalized"])
def test_coefficients_make_the_states_from_the_history(router_input: str):
    """s_{c+1} = r_0 h_emb + sum_i <r, w_i> y_i."""
    model = mesh_model(recurrence="mesh", num_loops=3, router_input=router_input).double()
    trace = build_tracer(model)(sequence())
    coefficients = trace.coefficients()
    cycles = model.config.num_loops + 1
    assert coefficients.shape == (len(sequence()), cycles, cycles + 1)
    history = torch.stack([trace.states[0], *trace.outputs[:cycles]], 1)
    states = torch.stack(trace.states[1 : cycles + 1], 1)
    # the model accumulates in float32 (and routes in it), whatever it computes in
    close(torch.einsum("sci,sid->scd", coefficients.double(), history), states, rtol=1e-5, atol=1e-5)
    assert coefficients.triu(2).eq(0).all(), "what comes later counts nothing"


def test_router_weights_are_distributions_and_differ_between_cycles():
    model = mesh_model(recurrence="mesh")
    trace = build_tracer(model)(sequence())
    assert len(trace.writes) == len(trace.reads) == model.config.num_loops + 1
    for weights in trace.writes + trace.reads:
        assert weights.shape == (len(sequence()), model.config.num_memory_slots)
        close(weights.sum(-1), torch.ones(len(sequence())))
    assert not torch.allclose(trace.writes[0], trace.writes[1])


@pytest.mark.parametrize("scheme", ["mesh", "base", "dynamic"])
@pytest.mark.parametrize("coda", [0, 2])
def test_readout_after_the_last_loop_is_the_models_loss(scheme: str, coda: int):
    model, ids = mesh_model(recurrence=scheme, num_coda_layers=coda), sequence()
    trace = build_tracer(model)(ids)
    loss = F.cross_entropy(trace.readout(trace.states[-2])[:-1], ids[1:])
    close(loss, model(ids[None], labels=ids[None]).loss)
    earlier = F.cross_entropy(trace.readout(trace.states[-3])[:-1], ids[1:])
    assert not torch.isclose(earlier, loss)


@pytest.mark.parametrize("layout", ["1+2+2+1", "6", "0+3+3+0"])
def test_a_plain_model_is_seen_in_blocks(layout: str):
    model, ids = plain_model(layers=6), sequence()
    blocks = Layout.parse(layout)
    trace = build_tracer(model, blocks)(ids)
    hidden = model(ids[None], output_hidden_states=True).hidden_states  # the last one is after the norm
    starts = [0, *(blocks.prelude + blocks.core * loop for loop in range(blocks.loops + 1))]
    for state, start in zip(trace.states[:-1], starts, strict=True):
        if start < 6:
            close(state, hidden[start][0], rtol=0, atol=0)
    close(model.base_model.final_layer_norm(trace.states[-1]), hidden[-1][0])
    for output, state in zip(trace.outputs, trace.states[1:], strict=True):
        close(output, state, rtol=0, atol=0)
    close(trace.readout(trace.states[-2]), model(ids[None]).logits[0])
    assert trace.writes == trace.reads == []


def test_a_layout_of_another_depth_is_refused():
    with pytest.raises(ValueError, match=r"--plain-layout 2\+4\+4\+2: has 12 computed layers, but .* has 6"):
        build_tracer(plain_model(layers=6), Layout.parse("2+4+4+2"))


def test_a_traced_model_is_as_it_was():
    model, ids = mesh_model(recurrence="mesh"), sequence()
    before = model(ids[None]).logits
    build_tracer(model)(ids)
    close(model(ids[None]).logits, before, rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
