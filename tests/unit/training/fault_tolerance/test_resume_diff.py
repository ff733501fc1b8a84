"""Settings that have changed since the checkpoint that a run continues."""

import json

import pytest

from mesh_megatron.config import cli
from mesh_megatron.config.run import RunConfig
from mesh_megatron.training.fault_tolerance.resume_diff import changes_since


@pytest.fixture
def checkpoint(tmp_path):
    def write(without=()):
        record = cli.to_dict(RunConfig()) | {"resolved": {}}
        kept = {name: value for name, value in record.items() if name not in without}
        (tmp_path / "run_config.json").write_text(json.dumps(kept, default=str))
        return tmp_path

    return write


def changes(checkpoint, **groups):
    run = cli.from_dict(RunConfig, groups, "test")
    return changes_since(checkpoint, run, {"global_batch_size": 8, "data_files": {}})


@pytest.mark.parametrize(
    ("groups", "line"),
    [
        ({"loops": {"loops_sampling": "uniform"}}, "--loops-sampling fixed -> uniform"),
        ({"loops": {"backprop_loops": 1}}, "--backprop-loops None -> 1"),
        ({"model": {"hidden_dropout": 0.1}}, "--hidden-dropout 0.0 -> 0.1"),
        ({"model": {"attention_dropout": 0.1}}, "--attention-dropout 0.0 -> 0.1"),
        ({"model": {"router_z_loss": 0.5}}, "--router-z-loss 0.0 -> 0.5"),
        ({"model": {"router_entropy_loss": 0.5}}, "--router-entropy-loss 0.0 -> 0.5"),
        ({"model": {"moe_aux_loss_coeff": 0.5}}, "--moe-aux-loss-coeff 0.01 -> 0.5"),
        ({"model": {"moe_z_loss_coeff": 0.5}}, "--moe-z-loss-coeff 0.0 -> 0.5"),
        ({"model": {"moe_router_bias_update_rate": 0.5}}, "--moe-router-bias-update-rate 0.001 -> 0.5"),
        ({"model": {"exit_entropy_coeff": 0.5}}, "--exit-entropy-coeff 0.1 -> 0.5"),
        ({"model": {"loop_loss_weights": [1, 2]}}, "--loop-loss-weights none -> 1.0 2.0"),
        ({"model": {"seq_length": 64}}, "--seq-length 2048 -> 64"),
        ({"parallel": {"grad_reduce_in_bf16": True}}, "--grad-reduce-in-bf16 False -> True"),
        ({"training": {"lr": 0.5}}, "--lr 0.0006 -> 0.5"),
    ],
    ids=str,
)
def test_what_bears_on_the_result_is_told(checkpoint, groups, line):
    assert changes(checkpoint(), **groups) == [line]


def test_what_has_no_effect_is_not_told(checkpoint):
    model = {"init_method_std": 0.5, "router_init": "sum", "memory_kernel": "slots", "loss_chunk_tokens": 8}
    assert changes(checkpoint(), model=model, parallel={"sequence_parallel": True}, data={"num_workers": 7}) == []


def test_a_checkpoint_of_an_older_version_lacks_groups(checkpoint):
    old = checkpoint(without=("loops", "parallel"))
    assert changes(old, loops={"loops_sampling": "uniform"}, parallel={"grad_reduce_in_bf16": True}) == []
