"""Optimizer state under the parameters' names and shapes, so that a checkpoint loads under any layout of ranks.

Each parameter ``name`` has ``optimizer.exp_avg.name`` and ``optimizer.exp_avg_sq.name`` of its own shape, and in
bfloat16 or float16 training ``optimizer.main.name``, its float32 weights. Muon's matrices have ``exp_avg`` only; SGD
has ``optimizer.momentum_buffer.name`` instead of both. Plain optimizers hold exactly these. The distributed optimizer
holds flat slices that follow its buckets: each rank writes and reads its slice as boxes of the parameter
(``checkpoint/flat_shards.py``), so nothing is gathered. The optimizer's step is one number.

Megatron-Core's own sharding is not used: as of 0.16.1 its resharable format misplaces state when there are several
gradient buckets, its plain format rejects float32 parameters (routers) in a bf16 model, and neither format can read
the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mesh_megatron.checkpoint.exact_weights import MAIN, SavedWeights
from mesh_megatron.checkpoint.flat_shards import of_weight, shards_of_slice

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
SGD_MOMENTS = ("momentum_buffer",)
MOMENTS = (*ADAM_MOMENTS, *SGD_MOMENTS)
Sharded = dict[str, Any]


class _Updated(NamedTuple):
    """A parameter that a sub-optimizer updates."""

    part: MegatronOptimizer
    name: str
    """Unique on this rank."""
    entry: ShardedBase
    """The parameter itself, and its place in the checkpoint."""
    main: nn.Parameter
    """Parameter that the inner optimizer updates."""
    span: slice
    """Range of ``main`` in the flat parameter."""


def state_to_save(optimizer: MegatronOptimizer, model_state: Sharded) -> Sharded:
    """Describe this rank's optimizer state as sharded tensors.

    ``model_state`` is the sharded state of this rank's modules, whose entries hold the parameters themselves.
    """
    tensors: Sharded = {}
    for part, name, entry, main, span in _updated(optimizer, model_state):
        state = part.optimizer.state.get(main, {})
        kinds = _moments_of(part, main)
        held = {kind: state[kind] if kind in state else torch.zeros_like(main) for kind in kinds}
        for kind, tensor in held.items():
            tensors |= _sharded(part, f"{kind}.{name}", entry, f"optimizer.{kind}.", tensor.detach(), span)
        if _has_main(entry.data):
            tensors |= _sharded(part, f"main.{name}", entry, MAIN, main.detach(), span)
    return tensors


def without_slices(model_state: Sharded) -> Sharded:
    """Return ``model_state`` without parameters of which this rank has a slice only (fully sharded ones)."""
    return {
        chunk: {name: entry for name, entry in entries.items() if not is_slice(entry)}
        for chunk, entries in model_state.items()
    }


def weights_to_save(model_state: Sharded) -> Sharded:
    """Return ``model_state`` with fully sharded parameters as boxes, in the precision in which they compute."""
    result = without_slices(model_state)
    for chunk, entries in model_state.items():
        for name, entry in entries.items():
            if is_slice(entry):
                shard = entry.data.slice
                weights = shard.parameter.detach().to(entry.data.low or torch.float32).flatten()
                boxes = shards_of_slice(entry, "", weights, shard.span)
                result[chunk] |= {f"{name}.{i}": box for i, box in enumerate(boxes)}
    return result


def is_slice(entry: Any) -> bool:
    """Return True for the entry of a fully sharded parameter."""
    return isinstance(getattr(entry, "data", None), DTensor)


def state_to_load(
    optimizer: MegatronOptimizer, model_state: Sharded, saved: SavedWeights, moments: tuple[str, ...]
) -> Sharded:
    """Request this rank's moments and main weights; main weights come from the most precise copy in ``saved``.

    ``moments`` are those that the checkpoint has; () for none to be loaded. Raises ``ValueError`` if it lacks others.
    """
    requests: Sharded = {}
    for part, name, entry, main, span in _updated(optimizer, model_state):
        wanted = _moments_of(part, main) if moments else ()
        saved.check_held(wanted, entry.key)
        sources = {kind: f"optimizer.{kind}." for kind in wanted}
        if _has_main(entry.data) or is_slice(entry):
            sources["main"] = saved.exact_prefix(entry.key)
        for kind, prefix in sources.items():
            empty = torch.empty(main.shape, dtype=torch.float32)
            requests |= _sharded(part, f"{kind}.{name}", entry, prefix, empty, span)
    return requests


def restore_state(optimizer: MegatronOptimizer, model_state: Sharded, loaded: dict[str, Tensor]) -> None:
    """Copy ``loaded``, the tensors that ``state_to_load`` requested, into the optimizer."""
    for part, name, _, main, _ in _updated(optimizer, model_state):
        found = {kind: _joined(loaded, f"{kind}.{name}") for kind in (*MOMENTS, "main")}
        state = {kind: tensor.view(main.shape) for kind, tensor in found.items() if tensor is not None}
        if "main" in state:
            main.data.copy_(state.pop("main"))
        if state:
            part.optimizer.state[main] = {kind: tensor.to(main.device, copy=True) for kind, tensor in state.items()}


def _updated(optimizer: MegatronOptimizer, model_state: Sharded) -> Iterator[_Updated]:
    """Yield every parameter of which this rank's optimizer updates at least a part."""
    entries = _entries_of_parameters(model_state)
    for part in sub_optimizers(optimizer):
        for parameter in held_parameters(part):
            yield _Updated(part, *entries[id(parameter)], *main_parameter(part, parameter))


def _sharded(
    part: MegatronOptimizer, name: str, entry: ShardedBase, prefix: str, tensor: Tensor, span: slice
) -> Sharded:
    """Shard a parameter's ``tensor``, or its slice ``span``, as ``name.0``, ``name.1``, ... with key ``prefix``."""
    if not isinstance(part, DistributedOptimizer) and not is_slice(entry):
        return {f"{name}.0": of_weight(entry, prefix, tensor, alone=getattr(part, "owns_parameters", False))}
    return {f"{name}.{i}": box for i, box in enumerate(shards_of_slice(entry, prefix, tensor.flatten(), span))}


def _joined(loaded: dict[str, Tensor], name: str) -> Tensor | None:
    """Join the tensors ``name.0``, ``name.1``, ... into one flat tensor; None if there are none."""
    flat: list[Tensor] = []
    while (piece := loaded.get(f"{name}.{len(flat)}")) is not None:
        flat.append(piece.flatten())
    return torch.cat(flat) if flat else None


def current_step(optimizer: MegatronOptimizer) -> int:
    """Return the number of updates applied, as the optimizer counts them for its bias correction."""
    for part in sub_optimizers(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:
                return int(group["step"])
            for parameter in group["params"]:
                if "step" in part.optimizer.state.get(parameter, {}):
                    return int(part.optimizer.state[parameter]["step"])
    return 0


def set_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Set the number of updates applied to ``step`` in every sub-optimizer."""
    for part in sub_optimizers(optimizer):
        if part.config.optimizer == "sgd":  # counts no steps
            continue
        _set_step(getattr(part.optimizer, "adam", part.optimizer), step)  # Muon counts no steps


def _set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set ``step``: torch keeps a separate tensor per parameter, Transformer Engine and apex a number per group."""
    keeps_own = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    for group in optimizer.param_groups:
        if not keeps_own:
            group["step"] = step
            continue
        for parameter in group["params"]:
            if parameter in optimizer.state:
                optimizer.state[parameter]["step"] = torch.tensor(float(step))


def _entries_of_parameters(model_state: Sharded) -> dict[int, tuple[str, ShardedBase]]:
    """Map each parameter's ``id`` to a name that is unique on this rank, and to its sharded entry.

    The entry's key is not unique: all experts of a layer are parts of one tensor in a checkpoint.
    """
    return {
        id(entry.data): (f"{chunk}.{name}", entry)
        for chunk, entries in model_state.items()
        for name, entry in entries.items()
        if isinstance(entry, ShardedBase)
    }


def _moments_of(part: MegatronOptimizer, main: Tensor) -> tuple[str, ...]:
    """Return the moments of the parameter ``main``: Muon keeps one of its matrices, SGD another one of all."""
    if part.config.optimizer == "sgd":
        return SGD_MOMENTS
    return ADAM_MOMENTS[:1] if main in getattr(part.optimizer, "matrices", ()) else ADAM_MOMENTS


def _has_main(parameter: nn.Parameter) -> bool:
    return parameter.dtype != torch.float32 or getattr(parameter, "low", None) is not None


def held_parameters(part: MegatronOptimizer) -> list[nn.Parameter]:
    """List the model parameters of which this rank's optimizer updates at least a part."""
    if isinstance(part, DistributedOptimizer):
        return list(part.model_param_group_index_map)
    if hasattr(part, "sharded"):
        return [part.sharded.get(parameter, parameter) for parameter in part.get_parameters()]
    if hasattr(part, "float16_groups"):
        groups = [*part.float16_groups, *part.fp32_from_fp32_groups]
        return [parameter for group in groups for parameter in group]
    return part.get_parameters()


def main_parameter(part: MegatronOptimizer, parameter: nn.Parameter) -> tuple[nn.Parameter, slice]:
    """Return the tensor that the inner optimizer updates, and its range of elements in the flat parameter."""
    if isinstance(parameter, DTensor):
        return parameter.slice  # type: ignore[attr-defined]
    if not isinstance(part, DistributedOptimizer):
        return getattr(parameter, "main_param", parameter), slice(0, parameter.numel())
    piece = part._get_model_param_range_map(parameter)["param"]
    return _main_shard(part, parameter), slice(piece.start, piece.end)


def _main_shard(part: DistributedOptimizer, parameter: nn.Parameter) -> nn.Parameter:
    """Return this rank's slice of a parameter, which the distributed optimizer updates.

    Its ``model_param_group_index_map`` cannot be used: it counts a group's parameters in the order of the buffers,
    while the group lists float32 parameters (routers) first.
    """
    if _has_main(parameter):
        return parameter.main_param  # type: ignore[attr-defined]
    for parameters, shards in zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True):
        for candidate, shard in zip(parameters, shards, strict=True):
            if candidate is parameter:
                return shard
    raise AssertionError("the optimizer holds no part of this parameter")


def sub_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """List the optimizers that Megatron-Core chained (for dense and for expert parameters), without empty ones."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if not part.is_stub_optimizer]
