"""FP8 settings that cannot work are refused with flag, value and fix."""

import pytest
from test_run import settings

GOOD = {"training": {"bf16": True}, "fp8": {"fp8_format": "hybrid"}}
BAD = [
    ({"fp8": {"fp8_recipe": "delayed"}}, 1, "--fp8-recipe has no effect without --fp8-format: add --fp8-format hybrid"),
    ({"fp8": {"fp8_core_only": True}}, 1, "--fp8-core-only has no effect without --fp8-format"),
    ({"fp8": {"fp8_format": "e4m3"}}, 1, "--fp8-format e4m3 needs --bf16"),
    (
        {**GOOD, "parallel": {"transformer_impl": "local"}},
        1,
        "--transformer-impl local: only Transformer Engine has FP8; use --transformer-impl transformer_engine",
    ),
    (
        {
            **GOOD,
            "fp8": {"fp8_format": "hybrid", "fp8_core_only": True},
            "model": {"layout": "4", "recurrence": "base"},
        },
        1,
        "--fp8-core-only with --layout 4: a plain model has no core",
    ),
    (
        {**GOOD, "fp8": {"fp8_format": "hybrid", "fp8_amax_history_len": 16}},
        1,
        "--fp8-amax-history-len 16 belongs to --fp8-recipe delayed, not tensorwise",
    ),
    (
        {**GOOD, "fp8": {"fp8_format": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 0}},
        1,
        "--fp8-amax-history-len 0: must be at least 1",
    ),
    (
        {
            **GOOD,
            "fp8": {"fp8_format": "hybrid", "fp8_recipe": "delayed"},
            "parallel": {"pipeline_model_parallel_size": 2},
            "training": {"bf16": True, "global_batch_size": 8},
        },
        2,
        "--fp8-recipe delayed with --pipeline-model-parallel-size 2: .* use --fp8-recipe tensorwise",
    ),
    (
        {
            **GOOD,
            "fp8": {"fp8_format": "hybrid", "fp8_recipe": "delayed"},
            "parallel": {"recompute_granularity": "full"},
        },
        1,
        "--fp8-recipe delayed with --recompute-granularity full: .* use --fp8-recipe tensorwise or",
    ),
    (
        {**GOOD, "model": {"seq_length": 40}},
        1,
        "--micro-batch-size x --seq-length is 40 on a rank, and --fp8-recipe tensorwise needs a multiple of 16",
    ),
    (
        {
            **GOOD,
            "fp8": {"fp8_format": "e4m3", "fp8_recipe": "mxfp8"},
            "model": {"hidden_size": 240, "num_attention_heads": 4, "kv_channels": 64},
        },
        1,
        "--hidden-size is 240 on a rank, and --fp8-recipe mxfp8 needs a multiple of 32",
    ),
    (
        {
            **GOOD,
            "fp8": {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
            "model": {"hidden_size": 320, "num_attention_heads": 10},
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        },
        2,
        "--hidden-size is 320 on a rank, and --fp8-recipe blockwise with --sequence-parallel needs a multiple of 128",
    ),
]


@pytest.mark.parametrize(("groups", "ranks", "message"), BAD, ids=[message[:50] for _, _, message in BAD])
def test_refused_before_any_rank_starts(groups, ranks, message):
    with pytest.raises(ValueError, match=message):
        settings(**groups).validate(ranks)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_what_is_right_passes(recipe):
    settings(**{**GOOD, "fp8": {"fp8_format": "hybrid", "fp8_recipe": recipe, "fp8_core_only": True}}).validate(1)


def test_a_ring_takes_recipes_without_a_history():
    ring = {"parallel": {"pipeline_model_parallel_size": 2}, "training": {"bf16": True, "global_batch_size": 8}}
    settings(**{**GOOD, **ring}).validate(2)
