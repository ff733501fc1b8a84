"""Megatron-Core's own way beside ours, in the ranks of a pool: what ``test_upstream_gaps.py`` compares."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from training_runs import build_trainer, checkpointer_of, steps

from mesh_megatron.checkpoint.optimizer_state import state_to_save, sub_optimizers
from mesh_megatron.config.run import RunConfig
from mesh_megatron.training.trainer import Trainer

FIRST_MOMENT = "exp_avg"


def model_state(trainer: Trainer) -> dict:
    state = {f"model{i}": module.sharded_state_dict() for i, module in enumerate(trainer.model.modules)}
    return {
        name: {key: value for key, value in chunk.items() if isinstance(value, ShardedTensor)}
        for name, chunk in state.items()
    }


def first_moments(run: RunConfig, count: int, ours: bool) -> dict[str, np.ndarray]:
    """Adam's first moment after ``count`` steps as this rank would write it, by parameter; NaN elsewhere."""
    trainer = build_trainer(run)
    steps(trainer, count)
    state = model_state(trainer)
    if ours:
        written = state_to_save(trainer.optimizer, state)
        prefix = f"optimizer.{FIRST_MOMENT}."
    else:
        written = upstream_state(trainer, "fully_reshardable")
        prefix = f"optimizer.state.{FIRST_MOMENT}."
    moments: dict[str, np.ndarray] = {}
    for shard in nested_values(written):
        if isinstance(shard, ShardedTensor) and shard.key.startswith(prefix):
            whole = moments.setdefault(shard.key.removeprefix(prefix), np.full(shard.global_shape, np.nan, np.float32))
            whole[shard.global_slice()] = shard.data.numpy()
    return moments


def upstream_state(trainer: Trainer, sharding: str) -> dict:
    metadata = {"distrib_optim_sharding_type": sharding}
    return trainer.optimizer.sharded_state_dict(model_state(trainer), is_loading=False, metadata=metadata)


def refusal(run: RunConfig, sharding: str) -> str | None:
    """Return Megatron-Core's error for the optimizer's sharded state; None if there is none."""
    trainer = build_trainer(run)
    steps(trainer, 1)
    try:
        upstream_state(trainer, sharding)
    except Exception as error:  # any kind: the test looks at the words
        return f"{type(error).__name__}: {error}"
    return None


def adam_steps_after_resume(run: RunConfig, ours: bool) -> set[int]:
    """Two steps, save and load, one step: how many updates Adam now believes each parameter has seen."""
    trainer = build_trainer(run)
    steps(trainer, 2)
    if ours:
        checkpointer = checkpointer_of(trainer)
        checkpointer.save()
        checkpointer.close()
    for part in sub_optimizers(trainer.optimizer):
        saved = part.state_dict()
        part.optimizer.state.clear()
        if not ours:
            part.load_state_dict(saved)
    if ours:
        assert run.checkpoint.save is not None
        checkpointer_of(trainer).load(Path(run.checkpoint.save) / "iter_0000002")
    steps(trainer, 1)
    states = [state for part in sub_optimizers(trainer.optimizer) for state in part.optimizer.state.values()]
    return {int(state["step"]) for state in states}


def memory_outlives_send(ours: bool) -> bool:
    """Return whether a sent tensor's memory still exists after its owner freed it and before the receiver is ready."""
    send = dist.isend if ours else dist.isend.__wrapped__  # type: ignore[attr-defined]
    if dist.get_rank() == 1:
        dist.barrier()
        received = torch.zeros(64)
        dist.recv(received, src=0)
        return bool((received == 1).all()) or not ours
    memory = np.ones(64, dtype=np.float32)
    alive = weakref.ref(memory)
    tensor = torch.from_numpy(memory)
    del memory
    work = send(tensor, dst=1)
    tensor.data = torch.empty(1)  # as the interleaved schedule frees an output it has sent
    outlives = alive() is not None
    dist.barrier()
    work.wait()
    return outlives


def gathers_in_the_background(rounds: int) -> bool:
    """Return whether many gathers into several buffers, awaited only after other work, give the right results."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    buffers = [torch.zeros(ranks, 256) for _ in range(4)]
    right = True
    for number in range(rounds):
        handles = []
        for buffer in buffers:
            buffer[rank].fill_(number + rank)
            with c10d._coalescing_manager(dist.group.WORLD, async_ops=True) as handle:
                dist.all_gather_into_tensor(buffer, buffer[rank], async_op=True)
            handles.append(handle)
        for _ in range(20):
            torch.ones(1) + 1
        for handle in handles:
            handle.wait()
        right &= all(bool((buffer[i] == number + i).all()) for buffer in buffers for i in range(ranks))
    return right
