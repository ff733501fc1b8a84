"""Build the modules that this rank trains: model or ring chunks, initialised and wrapped for data parallelism."""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from mesh_megatron.config.exits import EXIT_GATE
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.model.attention import ScaledDotProductAttention
from mesh_megatron.model.initialize import initialize_weights
from mesh_megatron.model.kernels.availability import fused_kernels_run
from mesh_megatron.model.layer import layer_specs
from mesh_megatron.model.mesh_model import MeshModel
from mesh_megatron.model.transformer_config import MeshTransformerConfig, transformer_config
from mesh_megatron.parallel.context import ContextParallelAttention
from mesh_megatron.parallel.engine_version import engine_mismatch
from mesh_megatron.parallel.fully_sharded import FullyShardedModel, finish_gradients
from mesh_megatron.parallel.loops import GradientReadiness, point_schedule_at, running_chunks, set_chunk_loops
from mesh_megatron.parallel.ring import PipelineRank, build_ring
from mesh_megatron.platform import device


@dataclass(eq=False)
class RankModel:
    """This rank's part of the model: one chunk, or those of a ring, each wrapped for data parallelism.

    The wrapper is Megatron-Core's ``DistributedDataParallel`` or ``FullyShardedModel``.
    """

    chunks: list[Any]
    config: TransformerConfig
    model: ModelConfig
    loops: int = field(init=False)
    """Number of times that the core runs now; see ``set_loops``."""

    def __post_init__(self) -> None:
        self.loops = self.model.segments.loops
        self._readiness = GradientReadiness(self.chunks, self.loops)

    def set_loops(self, loops: int) -> None:
        """Run the core ``loops`` times from the next pass on, at most as often as the layout says."""
        if loops == self.loops:
            return
        self.loops = loops
        self._arrange()
        self._readiness.expect(loops)

    def _arrange(self) -> None:
        set_chunk_loops(self.chunks, self.loops, self._exits)
        point_schedule_at(self.running, self.config)

    @property
    def _exits(self) -> bool:
        """True if training now computes the loss after every loop."""
        return self.model.losses_after_loops and self.chunks[0].training

    @property
    def running(self) -> list[DistributedDataParallel]:
        """The chunks that run now; those of a ring that are left out have no parameters of their own."""
        return running_chunks(self.chunks, self.loops, self._exits)

    @property
    def seq_length(self) -> int:
        return self.model.seq_length

    @property
    def expert_layers(self) -> int:
        """Number of layers with experts that a token passes, counted once per loop."""
        return self.model.segments.core * self.loops if self.model.num_experts is not None else 0

    @property
    def modules(self) -> list[Any]:
        """The chunks without their wrappers."""
        return [chunk.module for chunk in self.chunks]

    def complete_weights(self) -> None:
        """Finish the parameter all-gather that --overlap-param-gather defers to the next forward pass.

        Call it before weights are read outside of a forward pass.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def train(self, training: bool = True) -> None:
        """Train or evaluate from the next pass on; only training has losses after every loop, and their chunks."""
        for chunk in self.chunks:
            chunk.train(training)
        if self.model.losses_after_loops and len(self.chunks) > 1:
            self._arrange()


def build_model(run: RunConfig, vocabulary: int) -> RankModel:
    """Build, initialise and wrap this rank's part of the model; the process groups must exist.

    ``vocabulary`` is the padded number of rows of the embedding.
    """
    inside = run.parallel.use_torch_fsdp2 and run.parallel.recompute_granularity == "full"  # fully_sharded.py does it
    parallel = replace(run.parallel, recompute_granularity=None) if inside else run.parallel
    config = transformer_config(run.model, parallel, run.training.precision, run.fp8)
    config.deterministic_mode = run.training.deterministic_mode
    config.backprop_loops = run.loops.backprop_loops
    config.dropout_seed = run.training.seed
    implementation = resolve_implementation(run)
    use_fused_parts(config, implementation, rope_fusion=not run.parallel.no_rope_fusion)
    if run.parallel.use_torch_fsdp2:
        config.gradient_accumulation_fusion = False  # there are no gradient buffers to add to
    choose_attention(run.parallel.attention_backend)
    modules = build_modules(run, config, vocabulary)
    config.moe_router_enable_expert_bias = False  # the schedule reads it; training/expert_bias.py updates instead
    for module in modules:
        module.to(device.device())
        initialize_weights(module, run.model, run.training.seed)
        if run.model.exit_gate_only:
            for name, parameter in module.named_parameters():
                parameter.requires_grad = name.startswith(EXIT_GATE)
    chunks = _fully_shard(modules, config, run) if run.parallel.use_torch_fsdp2 else _wrap(modules, config, run)
    return RankModel(chunks, config, run.model)


def build_modules(run: RunConfig, config: MeshTransformerConfig, vocabulary: int) -> list[nn.Module]:
    """Build this rank's modules without initial weights: one model, or the chunks of a ring."""
    implementation = resolve_implementation(run)
    attention = ContextParallelAttention if run.parallel.context_parallel_size > 1 else ScaledDotProductAttention
    specs = layer_specs(run.model, implementation, attention, own_attention=_needs_own_attention(run))
    ranks = run.parallel.pipeline_model_parallel_size
    if ranks == 1:
        return [MeshModel(run.model, config, vocabulary, specs)]
    place = PipelineRank(parallel_state.get_pipeline_model_parallel_rank(), ranks)
    return build_ring(run.model, config, vocabulary, specs, place)


def _needs_own_attention(run: RunConfig) -> bool:
    """Return True if Transformer Engine's attention is not wanted or cannot be used.

    It ignores attention masks, it has no context parallelism in float32, and its dropout is not ours.
    """
    shared_in_float32 = run.parallel.context_parallel_size > 1 and run.training.precision == "fp32"
    own = run.parallel.attention_backend == "local" or run.model.attention_dropout > 0
    return own or run.data.reset_attention_mask or shared_in_float32


def choose_attention(backend: str) -> None:
    """Tell Transformer Engine which of its attentions to use, as ``--attention-backend``.

    Raises ``ValueError`` where its own variables say otherwise.
    """
    if backend in ("auto", "local"):
        return
    for name in ("flash", "fused", "unfused"):
        variable, value = f"NVTE_{name.upper()}_ATTN", str(int(name == backend))
        if os.environ.setdefault(variable, value) != value:
            raise ValueError(f"--attention-backend {backend} and {variable}={os.environ[variable]} differ: unset it")


def resolve_implementation(run: RunConfig) -> str:
    """Resolve ``--transformer-impl``; default: local, or Transformer Engine for FP8 and tensor parallelism.

    In bfloat16 on one GPU both spend the same time in kernels, and the engine's Python takes longer to start them
    (docs/performance.md). Over tensor-parallel ranks, which has not been measured, local layers
    add biases in passes of their own.
    """
    if run.parallel.transformer_impl is not None:
        if run.parallel.transformer_impl == "transformer_engine" and (reason := engine_mismatch()) is not None:
            raise ValueError(f"--transformer-impl transformer_engine: {reason}, or use --transformer-impl local")
        return run.parallel.transformer_impl
    wanted = run.fp8.fp8_format is not None or run.parallel.tensor_model_parallel_size > 1
    wanted = wanted and run.model.needs_local_layers is None
    return "transformer_engine" if wanted and device.has_gpu() and transformer_engine_imports() else "local"


def transformer_engine_imports() -> bool:
    """Return whether Transformer Engine imports; warn where it is installed and does not, or does not fit."""
    if (reason := engine_mismatch()) is not None:
        warnings.warn(f"{reason}. Using torch layers", stacklevel=2)
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError as error:
        if error.name == "transformer_engine":
            return False
        broken: Exception = error
    except Exception as error:  # a build for another CUDA or torch version fails in many ways
        broken = error
    else:
        return True
    warnings.warn(f"Transformer Engine is installed but does not import, using torch layers: {broken}", stacklevel=2)
    return False


def use_fused_parts(config: MeshTransformerConfig, implementation: str, rope_fusion: bool = True) -> None:
    """Enable the fused operations of Transformer Engine, apex and Triton, for a model that ``_wrap`` will wrap.

    The wrapper gives parameters float32 gradient buffers. Transformer Engine's linear layers accumulate weight
    gradients directly into them; Megatron-Core's need an extension of apex, which the CPU platform also provides.
    """
    engine = implementation == "transformer_engine"
    config.apply_rope_fusion = engine and rope_fusion
    config.fused_rotary = not engine and rope_fusion and fused_kernels_run(device.device())
    config.gradient_accumulation_fusion = engine or has_gradient_extension()


def has_gradient_extension() -> bool:
    """Return whether Megatron-Core's linear layers can accumulate weight gradients directly into their buffers."""
    try:
        import fused_weight_gradient_mlp_cuda  # noqa: F401
    except ImportError:
        return False
    return True


def _fully_shard(modules: list[Any], config: TransformerConfig, run: RunConfig) -> list[FullyShardedModel]:
    (module,) = modules
    chunk = FullyShardedModel(config, module, run.parallel)
    config.finalize_model_grads_func = finish_gradients
    config.no_sync_func = chunk.no_sync
    return [chunk]


def _wrap(modules: list[nn.Module], config: TransformerConfig, run: RunConfig) -> list[DistributedDataParallel]:
    parallel = run.parallel
    config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not parallel.grad_reduce_in_bf16,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=run.slices_optimizer,
        bucket_size=parallel.ddp_bucket_size,
    )
    # Gradients of later chunks become ready all at once; only the first chunk benefits from several buckets.
    chunks = [DistributedDataParallel(config, ddp, module, disable_bucketing=i > 0) for i, module in enumerate(modules)]
    point_schedule_at(chunks, config)
    return chunks
