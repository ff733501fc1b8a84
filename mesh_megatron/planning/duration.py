"""How long a run takes if its matrix products reach an assumed share of the GPU's peak; not held against a GPU yet."""

from __future__ import annotations

from dataclasses import dataclass

from mesh_megatron.planning.gpus import Gpu
from mesh_megatron.planning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Of a run; messages are taken to be hidden behind computation."""

    seconds_a_step: float
    tokens_a_second: float
    days: float
    gpu_hours: float


def duration(plan: Plan, gpu: Gpu, efficiency: float) -> Duration:
    """``efficiency`` is the share of the peak that a busy GPU reaches; full recompute adds a forward pass."""
    if not 0 < efficiency <= 1:
        raise ValueError(f"--efficiency {efficiency}: must be above 0 and at most 1")
    summary, training = plan.summary, plan.run.training
    peak = (gpu.fp32_tflops if training.precision == "fp32" else gpu.bf16_tflops) * 1e12
    passes = 4 / 3 if plan.run.parallel.recompute_granularity == "full" else 1
    operations = summary.tokens_per_step * summary.flops_per_token.total * passes
    seconds = operations / (summary.ranks.world_size * peak * efficiency) / (1 - plan.bubble)
    total = seconds * summary.train_iters
    return Duration(
        seconds_a_step=seconds,
        tokens_a_second=summary.tokens_per_step / seconds,
        days=total / 86400,
        gpu_hours=total / 3600 * summary.ranks.world_size,
    )
