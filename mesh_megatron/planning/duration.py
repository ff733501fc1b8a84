"""What a predicted step makes of a run: tokens a second, days, GPU-hours, share of the peak."""

from __future__ import annotations

from dataclasses import dataclass

from mesh_megatron.planning.hardware import Gpu
from mesh_megatron.planning.summary import RunSummary


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Of a run."""

    tokens_a_second: float
    mfu: float
    """Model FLOPs a second as a share of all GPUs' bfloat16 peak, also with FP8 or float32."""
    days: float
    gpu_hours: float


def duration(summary: RunSummary, gpu: Gpu, seconds_a_step: float) -> Duration:
    """``seconds_a_step`` is with the whole global batch; smaller ones of a ramp-up are taken to read as fast."""
    gpus, tokens_a_second = summary.ranks.world_size, summary.tokens_per_step / seconds_a_step
    total = summary.total_tokens / tokens_a_second
    return Duration(
        tokens_a_second=tokens_a_second,
        mfu=tokens_a_second * summary.flops_per_token.total / (gpus * gpu.bf16_tflops * 1e12),
        days=total / 86400,
        gpu_hours=total / 3600 * gpus,
    )
