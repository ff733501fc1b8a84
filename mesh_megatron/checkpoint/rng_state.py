"""Save and restore the random states of every rank as tensors of a checkpoint."""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from mesh_megatron.platform import device


def rng_state() -> dict[str, ShardedTensor]:
    """Describe the random states as sharded tensors with one row per rank; their keys contain the number of ranks."""
    states = {"cpu": torch.get_rng_state(), "device": device.rng_state()}
    states |= {f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    ranks, rank = device.world_size(), device.rank()
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{ranks}.{name}", state.unsqueeze(0), (0, rank, ranks))
        for name, state in states.items()
        if isinstance(state, torch.Tensor)
    }


def restore_rng(saved: dict[str, torch.Tensor]) -> None:
    """Set this rank's random states from its loaded rows, by the names of ``rng_state``."""
    states = {name: state.squeeze(0).contiguous() for name, state in saved.items()}
    torch.set_rng_state(states["cpu"])
    device.set_rng_state(states["device"])
    tracker = get_cuda_rng_tracker()
    tracked = {name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")}
    tracker.set_states(tracker.get_states() | tracked)
