"""A checkpoint is compared in the settings that its model has."""

import json

import pytest

from mesh_megatron.checkpoint.compatibility import check_same_model
from mesh_megatron.checkpoint.folder import CONFIG
from mesh_megatron.config import cli
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.run import RunConfig


@pytest.fixture
def checkpoint(tmp_path):
    def write(**settings):
        record = cli.to_dict(RunConfig(model=ModelConfig(**settings))) | {"resolved": {"padded_vocab_size": 128}}
        (tmp_path / "run_config.json").write_text(json.dumps(record, default=str))
        return tmp_path

    return write


@pytest.mark.parametrize(
    "changed",
    [
        {"num_memory_slots": 9},
        {"router_input": "normalized"},
        {"router_gate": "sigmoid"},
        {"router_temperature": 2.0},
        {"router_scale": 0.01},
    ],
    ids=str,
)
def test_settings_of_a_scheme_are_compared_where_the_model_has_it(checkpoint, changed):
    with pytest.raises(ValueError, match=next(iter(changed)).replace("_", "-")):
        check_same_model(checkpoint(recurrence="mesh"), ModelConfig(recurrence="mesh", **changed), 128)
    check_same_model(checkpoint(recurrence="residual"), ModelConfig(recurrence="residual", **changed), 128)


@pytest.mark.parametrize(
    "changed", [{"router_init": "sum"}, {"router_bias": 1.0}, {"router_init_std": 0.0}, {"router_scale": 0.5}], ids=str
)
def test_where_a_router_started_is_not_compared(checkpoint, changed):
    common = {"recurrence": "mesh", "router_scale": 0.01}
    check_same_model(checkpoint(**common), ModelConfig(**common | changed), 128)


@pytest.mark.parametrize(
    ("scheme", "changed"),
    [
        ("hyper", {"recurrence": "hyper-dynamic"}),
        ("hyper", {"hyper_lanes": 4}),
        ("decay", {"decay_input": "linear"}),
        ("adapter", {"loop_norm": True}),
        ("attend", {"loop_embedding": True}),
        ("base", {"per_loop_norms": True}),
        ("base", {"sandwich_norm": True}),
        ("base", {"loop_lora_rank": 4}),
        ("base", {"share_kv_across_loops": True}),
    ],
    ids=str,
)
def test_another_scheme_is_named(checkpoint, scheme, changed):
    name, value = next(iter(changed.items()))
    named = f"--{name.replace('_', '-')}"
    with pytest.raises(
        ValueError, match=f"holds another model: {named} .* there, {value} here: give the model's flags"
    ):
        check_same_model(checkpoint(recurrence=scheme), ModelConfig(**{"recurrence": scheme} | changed), 128)
    settings = {"hyper_lanes": 4, "decay_input": "linear"}
    check_same_model(checkpoint(recurrence="mesh"), ModelConfig(recurrence="mesh", **settings), 128)


@pytest.mark.parametrize(
    "changed", [{"hidden_dropout": 0.1}, {"attention_dropout": 0.1}, {"embedding_init_method_std": 0.1}], ids=str
)
def test_dropout_makes_no_other_model(checkpoint, changed):
    check_same_model(checkpoint(), ModelConfig(**changed), 128)
    check_same_model(checkpoint(**changed), ModelConfig(), 128)


def test_a_default_is_the_value_that_it_stands_for(checkpoint):
    check_same_model(checkpoint(layout="2+4R2+2", num_memory_slots=5), ModelConfig(layout="2+4R2+2"), 128)


def test_a_gate_may_be_new_to_a_model_that_is_finetuned(checkpoint):
    with_gate, without = {"layout": "2+4R2+2", "exit_gate": True}, {"layout": "2+4R2+2"}
    check_same_model(checkpoint(**without), ModelConfig(**with_gate, exit_gate_only=True), 128, finetune=True)
    check_same_model(checkpoint(**with_gate), ModelConfig(**with_gate, exit_gate_only=True), 128)
    with pytest.raises(ValueError, match="--exit-gate False there, True here"):
        check_same_model(checkpoint(**without), ModelConfig(**with_gate), 128)
    with pytest.raises(ValueError, match="--exit-gate True there, False here"):
        check_same_model(checkpoint(**with_gate), ModelConfig(**without), 128, finetune=True)


@pytest.mark.parametrize("other", [{}, {"ffn_hidden_size": 99}])
def test_of_a_changed_size_those_that_follow_from_it_are_not_named(checkpoint, other):
    folder = checkpoint(hidden_size=96)
    with pytest.raises(ValueError) as refused:
        check_same_model(folder, ModelConfig(hidden_size=192, **other), 256)
    given = "; --ffn-hidden-size 384 there, 99 here" if other else ""
    assert str(refused.value).startswith(f"{folder} holds another model: --hidden-size 96 there, 192 here{given}; ")
    assert "--padded-vocab-size 128 there, 256 here: give" in str(refused.value)
    assert "kv-channels" not in str(refused.value)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"model": {}}', '{"model": {}, "resolved": 3}', '{"model": {}, "resolved": {}}']
)
def test_settings_that_are_damaged_but_json_are_told_in_one_line(tmp_path, content):
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=f"{CONFIG} is damaged: it (holds no settings|names no model and vocabulary)"):
        check_same_model(tmp_path, ModelConfig(), 128)
