"""Closed-form counts against the paper's numbers, tensors counted one by one, and the real model."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.recurrence import SCHEMES
from mesh_megatron.planning.parameters import count_parameters

ROWS = 52352


def pythia_1_4b(**changes) -> ModelConfig:
    return ModelConfig(**(PRESETS["pythia-1.4b"] | changes))


@pytest.mark.parametrize(
    ("changes", "total", "non_embedding"),
    [
        ({"layout": "24", "recurrence": "vanilla"}, 1_423_036_416, 1_208_602_624),
        ({"recurrence": "base"}, 1_020_170_240, 805_736_448),
        ({"recurrence": "mesh", "num_memory_slots": 5}, 1_020_231_710, 805_797_918),
    ],
)
def test_table_5(changes, total, non_embedding):
    count = count_parameters(pythia_1_4b(**changes), ROWS)
    assert (count.total, count.non_embedding) == (total, non_embedding)


def layer_shapes(m: ModelConfig) -> list[tuple[int, ...]]:
    """Every tensor of a layer, written out as the model stores them."""
    heads, groups, head, ffn = m.num_attention_heads, m.query_groups, m.head_size, m.ffn_size
    qkv, fc1 = (heads + 2 * groups) * head, (2 * ffn if m.swiglu else ffn)
    shapes = [(qkv, m.hidden_size), (m.hidden_size, heads * head), (fc1, m.hidden_size), (m.hidden_size, ffn)]
    if not m.disable_bias_linear:
        shapes += [(qkv,), (m.hidden_size,), (fc1,), (m.hidden_size,)]
    return shapes + [(m.hidden_size,)] * (4 if m.normalization == "LayerNorm" else 2)


@pytest.mark.parametrize(
    ("swiglu", "bias_free", "norm", "groups", "kv_channels"),
    list(itertools.product((False, True), (False, True), ("LayerNorm", "RMSNorm"), (None, 2), (None, 24))),
)
def test_layer_is_the_sum_of_its_tensors(swiglu, bias_free, norm, groups, kv_channels):
    model = ModelConfig(
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=160,
        swiglu=swiglu,
        disable_bias_linear=bias_free,
        normalization=norm,
        num_query_groups=groups,
        kv_channels=kv_channels,
        rotary_percent=1.0,
    )
    expected = sum(math.prod(shape) for shape in layer_shapes(model))
    assert count_parameters(model, ROWS).layer.total == expected


@pytest.mark.parametrize("parallel", [True, False])
def test_residual_form_keeps_the_two_norms(parallel):
    assert count_parameters(ModelConfig(parallel_residual=parallel), ROWS).layer.norms == 4 * 768


@pytest.mark.parametrize(
    ("recurrence", "expected"),
    [
        ("base", 0),
        ("residual", 0),
        ("anchor", 0),
        ("residual+anchor+anchor_emb", 0),
        ("static", 3),
        ("dynamic", 3 * 2049),
        ("adapter", 2048 * 4097),
        ("decay", 2 * 2048),
        ("hyper", 2 * 2 * 4 + 2),
        ("hyper-dynamic", 2 * 2 * 4 + 2 + (2 * 4 + 1) * 2048),
        ("attend", 3 * 2048 + 2 + 3 + 4),
        ("mesh", 2 * 3 * 5 * 2049),
        ("vanilla", 0),
        ("vanilla+mesh", 2 * 3 * 5 * 2049),
    ],
)
def test_state_passing(recurrence, expected):
    count = count_parameters(pythia_1_4b(recurrence=recurrence), ROWS)
    assert count.recurrence == expected
    unique_core = 16 if recurrence.startswith("vanilla") else 8
    assert (count.prelude, count.core, count.coda) == tuple(n * count.layer.total for n in (4, unique_core, 4))


def test_tied_embedding_counts_once():
    tied = count_parameters(pythia_1_4b(untie_embeddings_and_output_weights=False), ROWS)
    untied = count_parameters(pythia_1_4b(), ROWS)
    assert untied.embedding == 2 * tied.embedding == 2 * ROWS * 2048
    assert tied.non_embedding == untied.non_embedding


TINY = {"layout": "1+2R3+2", "hidden_size": 32, "num_attention_heads": 4}
REAL = [
    *({"recurrence": name} for name in SCHEMES),
    {"recurrence": "decay", "decay_input": "linear"},
    {"exit_gate": True},
    {"recurrence": "anchor", "loop_norm": True, "loop_embedding": True, "per_loop_norms": True},
    {"per_loop_norms": True, "normalization": "RMSNorm", "num_experts": 4},
    {"sandwich_norm": True, "per_loop_norms": True},
    {"loop_lora_rank": 3},
    {"share_kv_across_loops": True},
    {"loop_lora_rank": 3, "swiglu": True, "num_query_groups": 2, "kv_channels": 16, "ffn_hidden_size": 48},
    {"sandwich_norm": True, "num_experts": 4, "parallel_residual": False},
    {"recurrence": "hyper-dynamic", "hyper_lanes": 3},
    {"recurrence": "vanilla", "layout": "5"},
    {"recurrence": "vanilla+mesh"},
    {"layout": "1+2+2+1", "num_memory_slots": 7},
    {"parallel_residual": False, "normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True},
    {"num_query_groups": 2, "kv_channels": 16, "ffn_hidden_size": 48, "untie_embeddings_and_output_weights": False},
    {"qk_layernorm": True, "num_query_groups": 2},
    {"disable_bias_linear": True, "add_qkv_bias": True, "num_query_groups": 2},
    {"qk_layernorm": True, "normalization": "RMSNorm", "kv_channels": 16},
    {"num_experts": 4, "moe_ffn_hidden_size": 24},
    {"num_experts": 4, "moe_shared_expert_intermediate_size": 40, "disable_bias_linear": True},
    {"num_experts": 4, "swiglu": True, "disable_bias_linear": True},
]


def test_equals_the_real_model():
    models = [ModelConfig(**(TINY | changes)) for changes in REAL]
    script = Path(__file__).with_name("count_real_parameters.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps([asdict(model) for model in models])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for model, real in zip(models, json.loads(done.stdout), strict=True):
        count = count_parameters(model, 128)
        parts = ("total", "embedding", "prelude", "core", "coda", "final_norm", "recurrence")
        assert {part: getattr(count, part) for part in parts} == real, model
