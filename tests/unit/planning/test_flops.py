"""FLOPs of a token against the published formulas and against products counted one by one."""

import pytest

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.planning.flops import layer_macs, training_flops_per_token
from mesh_megatron.planning.parameters import count_parameters

ROWS = 52352


def pythia_1_4b(**changes) -> ModelConfig:
    return ModelConfig(**(PRESETS["pythia-1.4b"] | changes))


def test_closed_form_of_narayanan_et_al():
    """72 l h^2 (1 + s/6h + V/12lh) a token without recompute, its attention term halved for the causal mask."""
    layers, hidden, sequence = 24, 2048, 4096
    flops = training_flops_per_token(pythia_1_4b(layout="24", recurrence="vanilla"), ROWS)
    expected = 72 * layers * hidden**2 * (1 + sequence / (2 * 6 * hidden) + ROWS / (12 * layers * hidden))
    assert flops.total == expected
    assert flops.state_passing == 0


def test_six_operations_a_matrix_parameter():
    model = ModelConfig(
        layout="2",
        recurrence="vanilla",
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=96,
        swiglu=True,
        disable_bias_linear=True,
    )
    flops, layer = training_flops_per_token(model, 128), count_parameters(model, 128).layer
    assert flops.projections == 6 * 2 * layer.attention
    assert flops.feed_forward == 6 * 2 * layer.feed_forward
    assert flops.logits == 6 * 64 * 128


def test_a_shared_core_costs_what_its_loops_compute():
    shared = training_flops_per_token(pythia_1_4b(recurrence="base"), ROWS)
    plain = training_flops_per_token(pythia_1_4b(layout="24", recurrence="vanilla"), ROWS)
    assert shared == plain


def test_mesh_by_counting_its_cycles():
    model = pythia_1_4b(layout="3+6R3+3")
    hidden, slots = model.hidden_size, model.memory_slots
    routing = mixing = 0
    for cycle in range(4):
        routing += 2 * slots * hidden
        for _ in range(cycle + 1):
            mixing += slots + hidden
        mixing += hidden
    flops = training_flops_per_token(model, ROWS)
    assert (flops.routing, flops.mixing) == (6 * routing, 6 * mixing)
    assert flops.state_passing / flops.total < 1e-3


def test_coefficient_schemes():
    static = training_flops_per_token(pythia_1_4b(recurrence="static"), ROWS)
    dynamic = training_flops_per_token(pythia_1_4b(recurrence="dynamic"), ROWS)
    assert (static.routing, static.mixing) == (0, 6 * 2 * 3 * 2048)
    assert (dynamic.routing, dynamic.mixing) == (6 * 2 * 3 * 2048, 6 * 2 * 3 * 2048)


def test_schemes_of_other_looped_models():
    """Products and weighted sums counted one by one: K = 2 loops, n = 3 lanes, D = 2048."""
    hidden, lanes = 2048, 3

    def of(**fields):
        flops = training_flops_per_token(pythia_1_4b(**fields), ROWS)
        return flops.routing / 6, flops.mixing / 6

    assert of(recurrence="adapter") == (hidden * hidden + 2 * hidden * hidden, 0)  # h_emb once, each loop's output
    assert of(recurrence="decay") == (0, hidden + 2 * hidden)
    assert of(recurrence="decay", decay_input="linear") == (hidden * hidden, 2 * hidden)
    mixing = 0
    for boundary in range(3):
        mixing += lanes * hidden  # the read
        if boundary > 0:
            mixing += lanes * lanes * hidden + lanes * hidden  # M l + w y
    assert of(recurrence="hyper", hyper_lanes=lanes) == (0, mixing)
    routing = sum(lanes * (1 + 1 + lanes) * hidden for _ in range(2)) + lanes * hidden
    assert of(recurrence="hyper-dynamic", hyper_lanes=lanes) == (routing, mixing)
    read = sum(cycle + 2 for cycle in range(3)) * hidden
    assert of(recurrence="attend") == (read, read)


def test_sequence_length_only_changes_attention():
    model = pythia_1_4b(recurrence="base")
    long, short = (training_flops_per_token(model, ROWS, seq_length=n) for n in (4096, 2048))
    assert long.attention == 2 * short.attention
    assert long.total - short.total == short.attention


def test_a_mixture_costs_the_experts_a_token_visits():
    dense = pythia_1_4b(recurrence="base")
    mixture = pythia_1_4b(recurrence="base", num_experts=16, moe_router_topk=2, moe_ffn_hidden_size=4096)
    flops, plain = training_flops_per_token(mixture, ROWS), training_flops_per_token(dense, ROWS)
    assert flops.feed_forward - plain.feed_forward == 6 * 16 * 16 * 2048  # two half experts are one, and the router
    assert flops.projections == plain.projections


def test_losses_after_loops_by_counting_what_runs():
    """Codas, logits and gates of K = 3 loops; and for mesh a further router and read after each loop but the last."""
    fields = {"layout": "3+6R3+4", "recurrence": "base"}
    hidden, layer = 2048, layer_macs(pythia_1_4b())
    plain, weighted, gate, alone = (
        training_flops_per_token(pythia_1_4b(**fields, **exits), ROWS)
        for exits in (
            {},
            {"loop_loss_weights": (1.0, 1.0, 1.0)},
            {"exit_gate": True},
            {"exit_gate": True, "exit_gate_only": True},
        )
    )
    of_layers = layer.projections + layer.attention + layer.feed_forward
    assert weighted.total - plain.total == 6 * 2 * (4 * of_layers + ROWS * hidden)
    assert gate.total - weighted.total == gate.routing == 6 * 3 * hidden
    # frozen: one product forward; the gate's input gets no gradient
    assert alone.total == (gate.total - gate.routing) // 3 + 4 * 3 * hidden
    fields["recurrence"] = "mesh"
    mesh, with_exits = (
        training_flops_per_token(pythia_1_4b(**fields, **exits), ROWS) for exits in ({}, {"exit_gate": True})
    )
    slots = 6
    routing = 2 * (2 * slots * hidden) + 3 * hidden
    mixing = sum((cycle + 1) * (hidden + slots) + hidden for cycle in (1, 2))
    assert with_exits.routing - mesh.routing == 6 * routing
    assert with_exits.mixing - mesh.mixing == 6 * mixing


@pytest.mark.parametrize(("recurrence", "reads"), [("hyper", 0), ("hyper-dynamic", 2 + 2), ("attend", 3 + 4)])
def test_exits_of_other_looped_models_read_once_more(recurrence, reads):
    """The two lanes, or h_emb and y_0..y_t, after each of K = 3 loops but the last."""
    weights = (1.0, 1.0, 1.0)
    plain, weighted = (
        training_flops_per_token(pythia_1_4b(layout="3+6R3+4", recurrence=recurrence, loop_loss_weights=each), ROWS)
        for each in ((), weights)
    )
    assert weighted.routing - plain.routing == 6 * reads * 2048
    assert weighted.mixing - plain.mixing == 6 * (reads or 2 + 2) * 2048
