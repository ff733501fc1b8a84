"""FP8 settings: format, scaling recipe, and which layers use FP8."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from mesh_megatron.config.bounds import Bounds, Count, check_bounds, flag
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """FP8: the layers' matrix products in eight bits, with Transformer Engine; routers stay in float32."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Use FP8, with --bf16 for everything else: e4m3 for all tensors, or hybrid with e5m2 for gradients."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """Scaling of tensors: by their own largest value (tensorwise), by the largest value of earlier steps
    (delayed), or block by block (blockwise from Hopper on, mxfp8 on Blackwell). Delayed scaling shares one scale
    between all loops of the core."""
    fp8_core_only: bool = False
    """FP8 in the core only: prelude and coda stay in bfloat16."""
    fp8_margin: Annotated[int, Bounds(least=0)] = 0
    """Delayed scaling: leave this many powers of two above the largest value."""
    fp8_amax_history_len: Count = 1
    """Delayed scaling: number of forward passes whose largest values are kept."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Delayed scaling: scale by the most recent of them or by the largest."""

    def alignment(self, sequence_parallel: bool) -> int:
        """Return the number that the dimensions of every matrix must be a multiple of.

        A sequence-parallel group gathers block-wise scaled activations in complete blocks of 128.
        """
        if self.fp8_recipe == "blockwise" and sequence_parallel:
            return 128
        return 32 if self.fp8_recipe == "mxfp8" else 16

    def validate(self, model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
        """Raise ``ValueError`` naming the flag, its value and the fix; ``preflight`` checks the device later."""
        check_bounds(self)
        if self.fp8_format is None:
            changed = [flag(f.name) for f in fields(self) if getattr(self, f.name) != f.default]
            if changed:
                raise ValueError(f"{changed[0]} has no effect without --fp8-format: add --fp8-format hybrid")
            return
        if not training.bf16:
            raise ValueError(f"--fp8-format {self.fp8_format} needs --bf16 for everything but matrix products: add it")
        if parallel.transformer_impl == "local":
            raise ValueError(
                f"--fp8-format {self.fp8_format} with --transformer-impl local: only Transformer Engine has FP8; "
                "use --transformer-impl transformer_engine or drop --fp8-format"
            )
        if self.fp8_core_only and model.segments.loops == 0:
            raise ValueError(f"--fp8-core-only with --layout {model.layout}: a plain model has no core; drop the flag")
        if self.fp8_recipe == "delayed":
            self._validate_delayed(parallel)
        else:
            for name in ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(
                        f"{flag(name)} {getattr(self, name)} belongs to --fp8-recipe delayed, not {self.fp8_recipe}: "
                        "drop one of the two"
                    )
        self._validate_sizes(model, parallel, training)
        again = [name for name in parallel.recompute_modules if name != "core_attn"]
        if parallel.recompute_granularity == "selective" and again:
            raise ValueError(
                f"--recompute-modules {again[0]} with --fp8-format: this has not been run in FP8; use "
                "--recompute-modules core_attn or --recompute-granularity full"
            )

    def _validate_delayed(self, parallel: ParallelConfig) -> None:
        if parallel.pipeline_model_parallel_size > 1:
            raise ValueError(
                f"--fp8-recipe delayed with --pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}: "
                "each loop is a separate chunk there, so a loop would be scaled by the range of another; use "
                "--fp8-recipe tensorwise"
            )
        if parallel.recompute_granularity == "full":
            raise ValueError(
                "--fp8-recipe delayed with --recompute-granularity full: Transformer Engine would scale the gradients "
                "of each recomputed layer by the range of the one before; use --fp8-recipe tensorwise or "
                "--recompute-granularity selective"
            )

    def _validate_sizes(self, model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
        tp = parallel.tensor_model_parallel_size
        split = parallel.context_parallel_size * (tp if parallel.sequence_parallel else 1)
        sizes = {
            "--micro-batch-size x --seq-length": training.micro_batch_size * model.seq_length // split,
            "--hidden-size": model.hidden_size,
            "--ffn-hidden-size": model.ffn_size // tp,
            "--num-attention-heads x --kv-channels": model.num_attention_heads * model.head_size // tp,
            "--num-query-groups x --kv-channels": model.query_groups * model.head_size // tp,
        }
        if model.num_experts is not None:
            sizes["--moe-ffn-hidden-size"] = model.expert_ffn_size // parallel.expert_tensor_size
        alignment = self.alignment(parallel.sequence_parallel)
        for sides, size in sizes.items():
            if size % alignment:
                why = " with --sequence-parallel" * (alignment == 128)
                raise ValueError(
                    f"{sides} is {size} on a rank, and --fp8-recipe {self.fp8_recipe}{why} needs a multiple of "
                    f"{alignment}: change it or drop --fp8-format"
                )
