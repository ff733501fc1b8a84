"""Settings that a ring of ranks cannot run are refused before any rank starts."""

from __future__ import annotations

import dataclasses

import pytest

from mesh_megatron.config.data import DataConfig
from mesh_megatron.config.layout import share
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.config.ring import layers_by_rank
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.planning.summary import RunSummary, summary_of


def run(parallel: dict, training: dict | None = None, **data: bool) -> RunConfig:
    return RunConfig(
        model=ModelConfig(padded_vocab_size=128),
        parallel=ParallelConfig(**parallel),
        training=TrainingConfig(train_iters=1, **(training or {})),
        data=DataConfig(mock_data=True, **data),
    )


@pytest.mark.parametrize(
    ("ranks", "batch", "words"),
    [
        (4, 24, "--global-batch-size 24 gives 3 micro-batches; .* a multiple of 4: use 32$"),
        (2, 40, "--global-batch-size 40 gives 5 micro-batches; .* a multiple of 2: use 32 or 48$"),
        (4, 48, "--global-batch-size 48 gives 6 micro-batches; .* a multiple of 4: use 32 or 64$"),
    ],
)
def test_micro_batches_of_a_step(ranks: int, batch: int, words: str) -> None:
    training = {"micro_batch_size": 8, "global_batch_size": batch}
    with pytest.raises(ValueError, match=words):
        run({"pipeline_model_parallel_size": ranks}, training).validate(ranks)


@pytest.mark.parametrize(
    ("rampup", "words"),
    [
        ((6, 2, 100), "--rampup-batch-size START 6 gives 6 micro-batches; .* a multiple of 4: use 4 or 8"),
        ((8, 2, 100), "--rampup-batch-size INCREMENT 2 gives 2 micro-batches; .* a multiple of 4: use 4"),
    ],
)
def test_micro_batches_during_ramp_up(rampup: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run({"pipeline_model_parallel_size": 4}, {"global_batch_size": 16, "rampup_batch_size": rampup}).validate(4)


def test_steps_of_a_ramp_up_that_fit() -> None:
    training = {"global_batch_size": 16, "rampup_batch_size": (4, 4, 100)}
    run({"pipeline_model_parallel_size": 4}, training).validate(4)


def test_ring_of_two_needs_overlap() -> None:
    with pytest.raises(ValueError, match="--no-overlap-p2p at --pipeline-model-parallel-size 2 gives wrong results"):
        run({"pipeline_model_parallel_size": 2, "overlap_p2p": False}, {"global_batch_size": 2}).validate(2)


def test_context_parallelism_has_no_document_masks() -> None:
    settings = run({"context_parallel_size": 2})
    settings.validate(2)
    words = {"tokenizer_type": "NullTokenizer", "vocab_size": 127}
    masked = dataclasses.replace(settings.data, reset_attention_mask=True, **words)
    with pytest.raises(ValueError, match="--reset-attention-mask does not work with --context-parallel-size 2"):
        dataclasses.replace(settings, data=masked).validate(2)


@pytest.mark.parametrize(("layers", "ranks"), [(8, 2), (3, 2), (1, 4), (0, 2), (7, 3)])
def test_shares_cover_a_segment_in_order(layers: int, ranks: int) -> None:
    parts = [share(range(layers), rank, ranks) for rank in range(ranks)]
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_layers_by_rank_count_every_loop() -> None:
    assert layers_by_rank(ModelConfig(layout="4+8R2+4"), 4) == [6, 6, 6, 6]
    assert layers_by_rank(ModelConfig(layout="1+3R2+1"), 2) == [2, 6]
    assert layers_by_rank(ModelConfig(layout="4", recurrence="vanilla"), 1) == [4]
    assert layers_by_rank(ModelConfig(layout="1+3R2+1", exit_gate=True), 2) == [2, 7]


def test_summary_shows_imbalance_and_nothing_where_there_is_none() -> None:
    def summary(layout: str, **model: bool) -> RunSummary:
        training = TrainingConfig(global_batch_size=8, train_iters=1)
        parallel = ParallelConfig(pipeline_model_parallel_size=2)
        return summary_of(
            RunConfig(model=ModelConfig(layout=layout, **model), parallel=parallel, training=training), 128, 2
        )

    uneven = summary("3+5R2+3")
    assert "layers by rank 6, 10: the busiest has 1.25 times the mean" in uneven.to_text()
    assert uneven.to_dict()["layers_by_rank"] == [6, 10]
    assert "imbalance" not in summary("4+8R2+4").to_text()
    exits = summary("4+8R2+4", exit_gate=True).to_text()
    assert "6 chunks each: prelude, core, core, gate, coda, coda" in exits
    assert "the last rank computes a token's logits and loss 2 times" in exits and "imbalance" not in exits
