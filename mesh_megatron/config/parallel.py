"""Parallelism settings: how ranks split tensors, sequence, layers, experts and data."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Annotated, Literal

from mesh_megatron.config.bounds import Bounds, Count, check_bounds
from mesh_megatron.config.model import ModelConfig

RecomputedModule = Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallelism: the layout of ranks, and activation recomputation."""

    tensor_model_parallel_size: Count = 1
    """Ranks that share each layer's matrices (TP)."""
    sequence_parallel: bool = False
    """Split norms, routers and recurrence memory along the sequence over the tensor-parallel ranks."""
    pipeline_model_parallel_size: Count = 1
    """Pipeline ranks (PP), which form a ring: each holds a share of every segment, and a micro-batch goes round the
    ring once per loop."""
    context_parallel_size: Count = 1
    """Ranks that share each sequence (CP)."""
    expert_model_parallel_size: Count = 1
    """Ranks that share a layer's experts (EP); a subgroup of the data- and context-parallel ranks."""
    expert_tensor_parallel_size: Count | None = None
    """Ranks that share each expert's matrices; default --tensor-model-parallel-size."""
    overlap_p2p: bool = True
    """Overlap the ring's sends and receives with computation."""

    use_distributed_optimizer: bool = False
    """Split optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the all-gather of updated parameters with the next forward pass; needs --use-distributed-optimizer and
    --overlap-grad-reduce."""
    use_torch_fsdp2: bool = False
    """Divide parameters, gradients and optimizer state over the data-parallel ranks (fully sharded data parallelism);
    layers are gathered where they compute. Without a pipeline."""
    num_distributed_optimizer_instances: Count = 1
    """With --use-torch-fsdp2, the number of groups of ranks that each hold the complete model in shares, such as nodes:
    layers are gathered inside a group, and only gradients cross its border."""
    grad_reduce_in_bf16: bool = False
    """With --bf16, add up and reduce the gradients of bfloat16 weights in bfloat16: half the memory and traffic, less
    exact."""
    ddp_bucket_size: Count | None = None
    """Elements in one gradient bucket; default Megatron-Core's choice."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute complete layers (full) or parts of layers (selective) in the backward pass."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With full recomputation: uniform recomputes all layers, in groups; block recomputes, one by one, only the first
    layers of what a rank computes at a time (its share of the prelude, of the core in each loop, of the coda)."""
    recompute_num_layers: Count = 1
    """uniform: layers per recomputed group, which never spans two segments of a rank; block: layers recomputed in each
    segment of a rank, once per loop."""
    recompute_modules: tuple[RecomputedModule, ...] = ("core_attn",)
    """Parts of layers that selective recomputation recomputes: attention without its projections, norms before linear
    layers (except those inside Transformer Engine's), feed-forward layers, mixtures of experts, or of these only the
    expert that every token passes."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library; default nccl with CUDA, gloo without."""
    distributed_timeout_minutes: Annotated[float, Bounds(above=0)] = 10
    """End the run when a collective takes longer than this."""
    transformer_impl: Literal["local", "transformer_engine"] | None = None
    """Layer implementation: torch (local) or Transformer Engine; default local, and Transformer Engine for FP8 and
    tensor parallelism where it can be imported and there is a GPU."""
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    """Attention in Transformer Engine's layers: FlashAttention, cuDNN (fused), plain products (unfused) or, as always
    with local layers, torch's (local); auto lets the engine choose."""
    no_rope_fusion: bool = False
    """Apply rotary positions in plain torch, not in a fused kernel (Transformer Engine's, or ours for local layers)."""

    @property
    def model_parallel_size(self) -> int:
        """Number of ranks per replica of the model: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Number of ranks that share each expert's matrices, with the default."""
        size = self.expert_tensor_parallel_size
        return self.tensor_model_parallel_size if size is None else size

    def recomputes(self, module: RecomputedModule) -> bool:
        """Return whether the backward pass computes these parts of a layer again, besides complete layers."""
        return self.recompute_granularity == "selective" and module in self.recompute_modules

    def recomputed_layers(self, layers: int) -> int:
        """Return how many of a segment's ``layers`` on a rank the backward pass computes again, completely."""
        if self.recompute_granularity != "full":
            return 0
        return layers if self.recompute_method == "uniform" else min(self.recompute_num_layers, layers)

    def share_ranks(self, world_size: int) -> int:
        """Return the number of ranks over which fully sharded parameters are divided."""
        return world_size // self.num_distributed_optimizer_instances

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of replicas among ``world_size`` ranks; raise ``ValueError`` if they do not divide."""
        if world_size % self.model_parallel_size:
            raise ValueError(
                f"{world_size} ranks cannot hold TP {self.tensor_model_parallel_size} x PP "
                f"{self.pipeline_model_parallel_size} x CP {self.context_parallel_size} = {self.model_parallel_size}: "
                f"start a multiple of {self.model_parallel_size} ranks (torchrun --nproc-per-node, --nnodes)"
            )
        return world_size // self.model_parallel_size

    def validate(self, model: ModelConfig, builds: bool = True) -> None:
        """Raise ``ValueError`` naming flag, value and fix; only a run that ``builds`` the model needs its libraries."""
        check_bounds(self)
        tp, cp = self.tensor_model_parallel_size, self.context_parallel_size
        sizes = {
            "num-attention-heads": model.num_attention_heads,
            "num-query-groups": model.query_groups,
            "ffn-hidden-size": model.ffn_size,
        }
        for flag, size in sizes.items():
            if size % tp:
                raise ValueError(
                    f"--{flag} {size} does not divide by --tensor-model-parallel-size {tp}: {_divisors(size)}"
                )
        if self.sequence_parallel and tp == 1:
            raise ValueError("--sequence-parallel needs --tensor-model-parallel-size above 1: drop it or raise that")
        if self.sequence_parallel and model.seq_length % (tp * cp):
            raise ValueError(
                f"--seq-length {model.seq_length} does not divide over {tp * cp} ranks (TP x CP with "
                "--sequence-parallel): use a multiple"
            )
        if cp > 1 and model.seq_length % (2 * cp):
            raise ValueError(
                f"--seq-length {model.seq_length} does not divide into 2 x --context-parallel-size {cp} chunks: use a "
                f"multiple of {2 * cp}"
            )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError(
                "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce: add both, or drop "
                "it"
            )
        self._validate_experts(model)
        self._validate_recompute(model)
        if (
            builds
            and self.transformer_impl == "transformer_engine"
            and importlib.util.find_spec("transformer_engine") is None
        ):
            raise ValueError(
                "--transformer-impl transformer_engine: Transformer Engine is not installed; "
                "pip install 'mesh-megatron[te]' or use --transformer-impl local"
            )

    def _validate_experts(self, model: ModelConfig) -> None:
        ep, etp, tp = self.expert_model_parallel_size, self.expert_tensor_size, self.tensor_model_parallel_size
        if model.num_experts is None:
            for name, size in (("model", ep), ("tensor", self.expert_tensor_parallel_size or 1)):
                if size > 1:
                    raise ValueError(
                        f"--expert-{name}-parallel-size {size} needs --num-experts: set it or drop the flag"
                    )
            return
        if model.num_experts % ep:
            raise ValueError(
                f"--num-experts {model.num_experts} does not divide by --expert-model-parallel-size {ep}: "
                f"{_divisors(model.num_experts)}"
            )
        if model.expert_ffn_size % etp:
            raise ValueError(
                f"--moe-ffn-hidden-size {model.expert_ffn_size} does not divide by --expert-tensor-parallel-size "
                f"{etp}: {_divisors(model.expert_ffn_size)}"
            )
        if (shared := model.moe_shared_expert_intermediate_size) is not None and shared % tp:
            raise ValueError(
                f"--moe-shared-expert-intermediate-size {shared} does not divide by --tensor-model-parallel-size {tp}: "
                f"{_divisors(shared)}"
            )
        if tp > 1 and not self.sequence_parallel:
            raise ValueError(f"--num-experts with --tensor-model-parallel-size {tp} needs --sequence-parallel: add it")
        if etp > 1 and not model.disable_bias_linear:
            raise ValueError(
                f"--num-experts: biases of experts cannot be split over {etp} tensor-parallel ranks; add "
                "--expert-tensor-parallel-size 1 or --disable-bias-linear"
            )
        pp, layers = self.pipeline_model_parallel_size, model.segments.core
        if ep > 1 and layers < pp:
            raise ValueError(
                f"--expert-model-parallel-size {ep}: every rank of a ring of {pp} must hold experts and the core has "
                f"{layers} layers; lower --pipeline-model-parallel-size to {layers}"
            )

    def _validate_recompute(self, model: ModelConfig) -> None:
        if self.recompute_method == "block" and self.recompute_granularity != "full":
            raise ValueError("--recompute-method block needs --recompute-granularity full: add it or drop the flag")
        if self.recomputes("moe") and model.num_experts is None:
            raise ValueError("--recompute-modules moe needs --num-experts: a dense feed-forward layer is mlp")
        if self.recomputes("shared_experts"):
            if model.moe_shared_expert_intermediate_size is None:
                raise ValueError(
                    "--recompute-modules shared_experts needs --moe-shared-expert-intermediate-size: add it, or drop "
                    "shared_experts"
                )
            if self.recomputes("moe"):
                raise ValueError("--recompute-modules moe recomputes the shared expert too: drop shared_experts")

    def validate_expert_ranks(self, world_size: int) -> None:
        """Check expert sizes against the number of ranks; raise ``ValueError`` as ``validate`` does."""
        stage = world_size // self.pipeline_model_parallel_size
        needed = self.expert_model_parallel_size * self.expert_tensor_size
        if stage % needed:
            raise ValueError(
                f"--expert-model-parallel-size {self.expert_model_parallel_size} x --expert-tensor-parallel-size "
                f"{self.expert_tensor_size} does not divide the {stage} ranks of a pipeline stage: start a multiple of "
                f"{needed * self.pipeline_model_parallel_size} ranks or lower them"
            )

    def validate_vocabulary(self, rows: int) -> None:
        """Raise ``ValueError`` if tensor-parallel ranks cannot share an embedding of ``rows`` evenly."""
        tensor = self.tensor_model_parallel_size
        if rows % tensor:
            raise ValueError(
                f"--padded-vocab-size {rows} does not divide by --tensor-model-parallel-size {tensor}: use "
                f"{-(-rows // tensor) * tensor}"
            )


def _divisors(size: int) -> str:
    fitting = [str(n) for n in range(1, min(size, 64) + 1) if size % n == 0]
    return "use " + ", ".join(fitting[:-1]) + (" or " if len(fitting) > 1 else "") + fitting[-1]
