"""Gaps of Megatron-Core that we work around: upstream's way is seen to fail, ours to work.

If a newer version has fixed a gap, its test is skipped with a message: then the workaround can be removed.
``docs/parallelism.md`` lists every gap with its workaround.
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BUCKETS, DISTOPT, OVERLAP, PP2, run_config
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from rank_pool import ROOT, RankPool
from training_runs import train
from upstream_runs import (
    adam_steps_after_resume,
    first_moments,
    gathers_in_the_background,
    memory_outlives_send,
    refusal,
)

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.model.attention import ScaledDotProductAttention
from mesh_megatron.model.norm import NORMS
from mesh_megatron.model.transformer_config import transformer_config

pytestmark = pytest.mark.full

SEVERAL_BUCKETS = run_config(layout=f"{OVERLAP} {BUCKETS}")


def skip_if_fixed(fixed: bool) -> None:
    if fixed:
        pytest.skip(f"fixed in megatron-core {version('megatron-core')}: the workaround can be removed")


def worst_error(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    errors = [np.linalg.norm(actual[name] - expected[name]) / np.linalg.norm(expected[name]) for name in expected]
    return float(max(errors))


class TestSeveralGradientBuckets:
    """``fully_reshardable`` writes optimizer state at the wrong offsets when buckets end in padding: silently."""

    @pytest.fixture(scope="class")
    def truth(self, ranks: RankPool) -> dict[str, np.ndarray]:
        return ranks.run(1, first_moments, run_config(), 3, True)[0]

    def test_upstream_misplaces_state(self, ranks: RankPool, truth: dict[str, np.ndarray]) -> None:
        written = ranks.run(2, first_moments, SEVERAL_BUCKETS, 3, False)[0]
        assert written.keys() == truth.keys()
        error = worst_error(written, truth)
        skip_if_fixed(error < 1e-4)
        assert error > 0.1

    def test_ours_writes_what_one_process_holds(self, ranks: RankPool, truth: dict[str, np.ndarray]) -> None:
        written: dict[str, np.ndarray] = {}
        for part in ranks.run(2, first_moments, SEVERAL_BUCKETS, 3, True):
            for name, held in part.items():
                before = written.setdefault(name, np.full_like(held, np.nan))
                assert not np.any(np.isfinite(before) & np.isfinite(held)), f"two ranks write {name}"
                written[name] = np.where(np.isfinite(before), before, held)
        assert written.keys() == truth.keys()
        assert worst_error(written, truth) < 1e-4


class TestSharedStep:
    """With torch's AdamW a loaded ``step`` is one tensor for all parameters, and each of them counts it up."""

    def test_upstream_counts_once_per_parameter(self, ranks: RankPool) -> None:
        counts = set().union(*ranks.run(2, adam_steps_after_resume, run_config(layout=DISTOPT), False))
        skip_if_fixed(counts == {3})
        assert max(counts) > 3

    def test_ours_counts_once_per_update(self, ranks: RankPool, tmp_path: Path) -> None:
        run = SEVERAL_BUCKETS
        run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save=tmp_path))
        assert set().union(*ranks.run(2, adam_steps_after_resume, run, True)) == {3}


def test_upstream_cannot_shard_float32_routers_of_a_bfloat16_model(ranks: RankPool) -> None:
    """Without a distributed optimizer; ``test_checkpoints.py`` shows ours."""
    words = ranks.run(1, refusal, run_config("--bf16"), "fully_reshardable")[0]
    skip_if_fixed(words is None)
    assert "does not match model shape" in words


def test_ring_of_two_without_overlap_is_wrong_and_refused(ranks: RankPool) -> None:
    """Both neighbours are the same rank, and the batched exchange mixes up which of its messages is which."""
    run = run_config(layout=f"{PP2} --no-overlap-p2p")
    with pytest.raises(ValueError, match="--no-overlap-p2p at --pipeline-model-parallel-size 2"):
        run.validate(2)
    expected = ranks.run(1, train, run_config())[0].losses
    losses = ranks.run(2, train, run)[0].losses
    skip_if_fixed(np.allclose(losses, expected, rtol=0, atol=1e-4))
    assert np.isfinite(losses).all(), "expected wrong numbers without an error or NaN"


class TestFreedOutputs:
    """The interleaved schedule frees an output right after sending it, which gloo may not have read yet."""

    def test_upstream_lets_go_of_memory_in_flight(self, ranks: RankPool) -> None:
        assert ranks.run(2, memory_outlives_send, False) == [False, True]

    def test_ours_keeps_it(self, ranks: RankPool) -> None:
        assert ranks.run(2, memory_outlives_send, True) == [True, True]


def test_background_gathers(ranks: RankPool) -> None:
    """gloo's own gather into several buffers at once corrupts the heap: without our workaround ten of ten runs died."""
    assert ranks.run(2, gathers_in_the_background, 500) == [True, True]


def test_sequence_parallel_norms() -> None:
    """Megatron-Core's wrapper of torch's norms refuses; ours have their gradients summed over the parts."""
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    config = transformer_config(ModelConfig(), parallel)
    with pytest.raises(AssertionError, match="sequence parallel"):
        WrappedTorchNorm(config, 32)
    for norm in NORMS.values():
        assert all(parameter.sequence_parallel for parameter in norm(config, 32).parameters())


def test_context_parallel_attention() -> None:
    """Megatron-Core's local attention refuses; ours is held to one process by the cp2 cases of ``cases.py``."""
    config = transformer_config(ModelConfig(), ParallelConfig(context_parallel_size=2))
    with pytest.raises(AssertionError, match="Context parallelism"):
        DotProductAttention(config, 1, AttnMaskType.causal, "self")
    ScaledDotProductAttention(config, 1)


def test_psutil_is_declared() -> None:
    """Without it saving a checkpoint hangs for ever, and Megatron-Core does not ask for it."""
    assert any(line.startswith("psutil==") for line in (ROOT / "requirements/runtime.txt").read_text().splitlines())


def test_torch_adam_is_what_is_tested() -> None:
    """The shared ``step`` is a gap of torch's AdamW: with apex or Transformer Engine there is another optimizer."""
    from megatron.core import optimizer

    assert optimizer.Adam is torch.optim.AdamW
