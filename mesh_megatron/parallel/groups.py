"""Process groups, created and stored by Megatron-Core."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from mesh_megatron.config.ring import ring_chunks
from mesh_megatron.config.run import RunConfig
from mesh_megatron.parallel.megatron_patches import apply_patches
from mesh_megatron.platform import device


def check_backend(run: RunConfig) -> None:
    """Raise ``ValueError`` if the layout needs a collective that the communication library does not support."""
    parallel = run.parallel
    split_both_ways = parallel.expert_model_parallel_size > 1 and parallel.expert_tensor_size > 1
    if split_both_ways and not device.gathers_uneven_parts(parallel.distributed_backend):
        raise ValueError(
            f"--expert-model-parallel-size {parallel.expert_model_parallel_size} with --expert-tensor-parallel-size "
            f"{parallel.expert_tensor_size}: gloo cannot gather parts of different lengths; use "
            "--expert-tensor-parallel-size 1, or nccl"
        )


def start_model_parallel(run: RunConfig) -> None:
    """Split the ranks into tensor, context, expert, data and pipeline groups, and seed each rank's random state."""
    apply_patches()
    parallel = run.parallel
    ring = parallel.pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=ring,
        virtual_pipeline_model_parallel_size=len(ring_chunks(run.model)) if ring > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        create_gloo_process_groups=False,  # many sockets, and only Megatron-LM's own checkpoints use them
    )
    torch.manual_seed(run.training.seed)
    model_parallel_cuda_manual_seed(run.training.seed)


def stop_model_parallel() -> None:
    """Destroy the groups, so that this process can start another run."""
    parallel_state.destroy_model_parallel()


def data_parallel() -> tuple[int, int]:
    """Return this rank's index among the data-parallel replicas, and their number."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def sequence_groups(config: TransformerConfig) -> list[torch.distributed.ProcessGroup]:
    """List the groups whose ranks hold different positions of the same sequences (tensor and context parallel)."""
    groups = [parallel_state.get_context_parallel_group()]
    if config.sequence_parallel:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    return groups


def on_first_stage() -> bool:
    return parallel_state.is_pipeline_first_stage(ignore_virtual=True)


def on_last_stage() -> bool:
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)
