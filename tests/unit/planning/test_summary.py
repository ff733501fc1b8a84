"""The summary of a run: right numbers, refusals that name the flag, JSON that reads back."""

import json

import pytest

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.planning.duration import duration
from mesh_megatron.planning.hardware import gpu_named
from mesh_megatron.planning.summary import summary_of
from mesh_megatron.planning.tables import rounded

MODEL = ModelConfig(**PRESETS["pythia-1.4b"], recurrence="mesh", num_memory_slots=5)


def summary(model=MODEL, rows=52352, world_size=1, **sizes):
    parallel = ParallelConfig(**{f"{name}_parallel_size": size for name, size in sizes.items()})
    training = TrainingConfig(micro_batch_size=4, global_batch_size=512, train_iters=1000)
    return summary_of(RunConfig(model=model, parallel=parallel, training=training), rows, world_size)


def test_numbers_of_a_run():
    run = summary(world_size=64, tensor_model=2, context=2, pipeline_model=4)
    assert run.ranks.data == 4
    assert run.micro_batches == 32
    assert run.tokens_per_step == 512 * 4096
    assert run.total_tokens == 1000 * run.tokens_per_step
    assert (run.layout, run.unique_layers, run.computed_layers, run.loops) == ("4+8R2+4", 16, 24, 2)


def test_a_trillion_tokens_less_a_part_of_a_batch():
    training = TrainingConfig(train_tokens=10**12, global_batch_size=512)
    run = summary_of(RunConfig(model=MODEL, training=training), 52352, 8)
    assert run.total_tokens == 999_999_668_224
    assert "476,837 (1T tokens)" in run.to_text()


def test_numbers_in_tables_have_no_exponents():
    shown = [rounded(number) for number in (0.01234, 12.34, 999.4, 999.6, 1234.5)]
    assert shown == ["0.0123", "12.3", "999", "1,000", "1,234"]


def test_a_ramp_up_reads_less_than_whole_batches():
    training = TrainingConfig(
        train_samples=20480, micro_batch_size=4, global_batch_size=512, rampup_batch_size=(32, 32, 5120)
    )
    run = RunConfig(model=ModelConfig(**PRESETS["pythia-160m"]), training=training)
    whole = summary_of(run, 52352, 8)
    assert whole.total_tokens == training.samples_after(whole.train_iters, 512, 4096) * 4096
    assert 20480 - 512 < whole.train_samples <= 20480
    assert whole.total_flops == whole.total_tokens * whole.flops_per_token.total
    days = duration(whole, gpu_named("h100"), 1.0).days
    assert days * 86400 == pytest.approx(whole.train_samples / 512)


def test_json_holds_every_total():
    record = json.loads(json.dumps(summary(world_size=8).to_dict()))
    assert record["parameters"]["total"] == 1_020_231_710
    assert record["parameters"]["non_embedding"] == 805_797_918
    assert record["flops_per_token"]["total"] == summary().flops_per_token.total
    assert record["total_flops"] == record["total_tokens"] * record["flops_per_token"]["total"]
    assert record["ranks"]["data"] == 8


def test_text_reads():
    text = summary(world_size=8, tensor_model=2, pipeline_model=4).to_text()
    assert "1,020,231,710 (1.02B)" in text
    assert "mesh, layout 4+8R2+4" in text and "5 memory slots" in text
    assert "16 unique, 24 computed" in text
    assert "ring of 4 ranks, 4 chunks each: prelude, core, core, coda" in text
    assert "512 sequences = micro-batch size " in text
    assert max(map(len, text.splitlines())) < 160


def test_no_memory_where_there_is_none():
    run = summary(ModelConfig(layout="4", recurrence="vanilla"), 128)
    assert run.memory_slots is None
    assert not any(word in run.to_text() for word in ("slots", "ring", "experts"))
    assert run.layout == "4"


def test_experts_show():
    run = summary(ModelConfig(num_experts=8, padded_vocab_size=128), 128)
    assert "8 experts in the core" in run.to_text()
    assert run.to_dict()["parameters"]["core_layer"]["total"] > run.to_dict()["parameters"]["layer"]["total"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"world_size": 6, "tensor_model": 4}, "6 ranks cannot hold TP 4 x PP 1 x CP 1"),
        ({"world_size": 8, "expert_model": 3}, "--expert-model-parallel-size 3"),
        ({"world_size": 3}, "--global-batch-size 512"),
    ],
)
def test_what_does_not_divide_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        summary(**changes)
