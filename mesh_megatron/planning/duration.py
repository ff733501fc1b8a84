"""Duration of a run from its predicted step time: tokens per second, days, GPU-hours, share of the peak."""

from __future__ import annotations

from dataclasses import dataclass

from mesh_megatron.planning.hardware import Gpu
from mesh_megatron.planning.summary import RunSummary


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Predicted duration of a run."""

    tokens_a_second: float
    """Tokens per second, over all GPUs."""
    mfu: float
    """Model FLOPs utilization: a share of all GPUs' bfloat16 peak, also with FP8 or float32."""
    days: float
    gpu_hours: float


def duration(summary: RunSummary, gpu: Gpu, seconds_a_step: float) -> Duration:
    """Compute the duration from ``seconds_a_step``, the time of a step with the full global batch.

    Smaller batches of a ramp-up are assumed to process as many tokens per second.
    """
    gpus, tokens_a_second = summary.ranks.world_size, summary.tokens_per_step / seconds_a_step
    total = summary.total_tokens / tokens_a_second
    return Duration(
        tokens_a_second=tokens_a_second,
        mfu=tokens_a_second * summary.flops_per_token.total / (gpus * gpu.bf16_tflops * 1e12),
        days=total / 86400,
        gpu_hours=total / 3600 * gpus,
    )
