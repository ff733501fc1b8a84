"""Optimizer state in the model's own names and shapes, so that a checkpoint continues under any layout of ranks.

Each parameter ``name`` has ``optimizer.exp_avg.name`` and ``optimizer.exp_avg_sq.name`` of its own shape, and
``optimizer.main.name``, its float32 weights, where training runs in less. Plain optimizers hold just that. The
distributed optimizer holds flat slices that follow its buckets: they are gathered bucket by bucket, each on another
data-parallel rank, and cut again on loading. The optimizer's step is one number.

Megatron-Core's own sharding does not serve here: as of 0.16.1 its resharable format misplaces state when there are
several gradient buckets, its plain format refuses float32 parameters (routers) in a bf16 model, and the two formats
do not read each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from mesh_megatron.training.optimizer import parts

MOMENTS = ("exp_avg", "exp_avg_sq")
GATHERED_AT_A_TIME = 1 << 26
"""Numbers in float32 on the device that gathers."""
Sharded = dict[str, Any]


def state_to_save(optimizer: MegatronOptimizer, model_state: Sharded) -> Sharded:
    """Sharded tensors of the optimizer's state; collective over data-parallel ranks.

    ``model_state`` is the sharded state of this rank's modules, whose entries hold the parameters themselves.
    """
    entries = _entries_of_parameters(model_state)
    tensors: Sharded = {}
    for part in parts(optimizer):
        whole = _gathered(part) if isinstance(part, DistributedOptimizer) else _plain(part)
        for parameter, kind, tensor in whole:
            name, entry = entries[id(parameter)]
            sharded = make_sharded_optimizer_tensor(entry, tensor, prefix=f"optimizer.{kind}")
            if isinstance(part, DistributedOptimizer):  # held by one data-parallel rank, whichever gathered it
                sharded.replica_id = (*sharded.replica_id[:-1], 0)
            tensors[f"{kind}.{name}"] = sharded
    return tensors


def state_to_load(optimizer: MegatronOptimizer, model_state: Sharded, kinds: tuple[str, ...]) -> Sharded:
    """Requests for whatever this rank holds a part of; ``kinds`` as the checkpoint has them."""
    entries = _entries_of_parameters(model_state)
    requests: Sharded = {}
    for part in parts(optimizer):
        for parameter in _held_parameters(part):
            name, entry = entries[id(parameter)]
            for kind in kinds:
                if kind == "main" and not _has_main(parameter):
                    continue
                empty = torch.empty(parameter.shape, dtype=torch.float32)
                requests[f"{kind}.{name}"] = make_sharded_optimizer_tensor(entry, empty, prefix=f"optimizer.{kind}")
    return requests


def restore_state(optimizer: MegatronOptimizer, model_state: Sharded, loaded: dict[str, Tensor], step: int) -> None:
    """Put what ``state_to_load`` asked for into the optimizer; main weights not in it come from the model."""
    entries = _entries_of_parameters(model_state)
    optimizer.reload_model_params()
    for part in parts(optimizer):
        for parameter in _held_parameters(part):
            name, _ = entries[id(parameter)]
            main, piece = _main_parameter(part, parameter)
            names = {kind: f"{kind}.{name}" for kind in (*MOMENTS, "main")}
            found = {
                kind: loaded[key].flatten()[piece].view(main.shape) for kind, key in names.items() if key in loaded
            }
            if "main" in found:
                main.data.copy_(found.pop("main"))
            if found:
                part.optimizer.state[main] = {kind: tensor.to(main.device, copy=True) for kind, tensor in found.items()}
        _set_step(part.optimizer, step)


def current_step(optimizer: MegatronOptimizer) -> int:
    """Updates applied so far, as the optimizer counts them for its bias correction."""
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:
                return int(group["step"])
            for parameter in group["params"]:
                if "step" in part.optimizer.state.get(parameter, {}):
                    return int(part.optimizer.state[parameter]["step"])
    return 0


def _set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """torch keeps a step for every parameter (each must be its own tensor), Transformer Engine and apex one a group."""
    keeps_own = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    for group in optimizer.param_groups:
        if not keeps_own:
            group["step"] = step
            continue
        for parameter in group["params"]:
            if parameter in optimizer.state:
                optimizer.state[parameter]["step"] = torch.tensor(float(step))


def _entries_of_parameters(model_state: Sharded) -> dict[int, tuple[str, ShardedBase]]:
    """By a parameter's identity: a name for it on this rank, and its entry.

    The entry's key does not tell parameters apart: all experts of a layer are parts of one tensor in a checkpoint.
    """
    return {
        id(entry.data): (f"{chunk}.{name}", entry)
        for chunk, entries in model_state.items()
        for name, entry in entries.items()
        if isinstance(entry, ShardedBase)
    }


def _has_main(parameter: nn.Parameter) -> bool:
    return parameter.dtype != torch.float32


def _plain(part: MegatronOptimizer) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
    for parameter in _held_parameters(part):
        main, _ = _main_parameter(part, parameter)
        state = part.optimizer.state.get(main, {})
        for kind in MOMENTS:
            yield parameter, kind, state[kind] if kind in state else torch.zeros_like(main)
        if _has_main(parameter):
            yield parameter, "main", main


def _held_parameters(part: MegatronOptimizer) -> list[nn.Parameter]:
    """Model parameters that this rank's optimizer updates, wholly or in part."""
    if isinstance(part, DistributedOptimizer):
        return list(part.model_param_group_index_map)
    if hasattr(part, "float16_groups"):
        groups = [*part.float16_groups, *part.fp32_from_fp32_groups]
        return [parameter for group in groups for parameter in group]
    return part.get_parameters()


def _main_parameter(part: MegatronOptimizer, parameter: nn.Parameter) -> tuple[nn.Parameter, slice]:
    """The tensor the inner optimizer steps on, and which elements of the flat parameter it is."""
    if not isinstance(part, DistributedOptimizer):
        return getattr(parameter, "main_param", parameter), slice(0, parameter.numel())
    piece = part._get_model_param_range_map(parameter)["param"]
    return _main_shard(part, parameter), slice(piece.start, piece.end)


def _main_shard(part: DistributedOptimizer, parameter: nn.Parameter) -> nn.Parameter:
    """This rank's slice of a parameter, as the distributed optimizer steps on it.

    Not by its ``model_param_group_index_map``: that counts a group's parameters in the buffers' order, while the group
    holds float32 ones (routers) first.
    """
    if _has_main(parameter):
        return parameter.main_param  # type: ignore[attr-defined]
    for parameters, shards in zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True):
        for candidate, shard in zip(parameters, shards, strict=True):
            if candidate is parameter:
                return shard
    raise AssertionError("the optimizer holds no part of this parameter")


def _gathered(part: DistributedOptimizer) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
    """Whole tensors of the buckets that this data-parallel rank gathers, spread evenly over all ranks."""
    group = part.data_parallel_group
    ranks, number, buckets = group.size(), 0, sum(len(buffer.buckets) for buffer in part.buffers)
    for buffer, ranges_of_dtypes in zip(part.buffers, part.gbuf_ranges, strict=True):
        (ranges_of_buckets,) = ranges_of_dtypes.values()
        for bucket, ranges in zip(buffer.buckets, ranges_of_buckets, strict=True):
            owner = owner_of(number, buckets, ranks)
            number += 1
            kinds = (*MOMENTS, "main") if _has_main(bucket.params_list[0]) else MOMENTS
            for kind in kinds:
                piece = _local_piece(part, bucket, ranges["param_map"], kind, ranks)
                whole = _gather_to(owner, piece, group)
                if whole is None:
                    continue
                for parameter in bucket.params_list:
                    start, stop, _ = buffer.param_index_map[parameter]
                    yield parameter, kind, whole[start - bucket.offset : stop - bucket.offset].view(parameter.shape)


def owner_of(number: int, buckets: int, ranks: int) -> int:
    """The rank that gathers bucket ``number`` of ``buckets``: few large ones lie on nodes far from each other."""
    return number * ranks // buckets


def _gather_to(owner: int, piece: Tensor, group: dist.ProcessGroup) -> Tensor | None:
    """All ranks' equal pieces in a row, in the CPU's memory of ``owner``; slice by slice, for a GPU has little room."""
    ranks = group.size()
    whole = torch.empty(ranks, len(piece), dtype=piece.dtype) if group.rank() == owner else None
    step = max(GATHERED_AT_A_TIME // ranks, 1)
    for start in range(0, len(piece), step):
        part = piece[start : start + step]
        parts = part.new_empty(ranks * len(part))
        dist.all_gather_into_tensor(parts, part, group=group)  # nccl's gather would connect the owner to every rank
        if whole is not None:
            whole[:, start : start + step] = parts.view(ranks, -1)
    return None if whole is None else whole.flatten()


def _local_piece(part: DistributedOptimizer, bucket: Any, param_map: dict, kind: str, ranks: int) -> Tensor:
    """This rank's flat share of a bucket, padding included."""
    numel = bucket.grad_data.numel() // ranks
    piece = torch.zeros(numel, dtype=torch.float32, device=bucket.grad_data.device)
    for parameter, ranges in param_map.items():
        main, _ = _main_parameter(part, parameter)
        source = main if kind == "main" else part.optimizer.state.get(main, {}).get(kind)
        if source is not None:
            piece[ranges["gbuf_local"].start : ranges["gbuf_local"].end].copy_(source.detach().flatten())
    return piece
