"""Fully sharded data parallelism: torch's ``fully_shard`` on every layer, with our normalisation of gradients.

Each rank holds a share of the rows of every parameter, in float32, with its gradient and its optimizer state. A layer
is gathered, in the run's precision, before it computes and again in the backward pass, the shared core for each loop.
Gradients add up in float32 over all ranks and are divided by the tokens of the step. Those of a layer are reduced in
every micro-batch; those of a shared core once per step, after the backward pass of its first loop.

The parameters of the recurrence (routers, coefficients) are float32, few, and read outside of a forward pass of their
module: every rank keeps them completely.

With --num-distributed-optimizer-instances the ranks form groups that each hold the complete model in shares (HSDP):
layers are gathered inside a group, and reduced shares are summed over the groups.

Full recomputation is inside of a layer, around its forward pass alone: ``fully_shard`` gathers the layer, then the pass
is computed again. Around the layer, as Megatron-Core does it, torch takes the second recomputation of a shared layer
for a part of the backward pass that has begun, and drops the gradients of all loops but one (torch 2.13,
``FSDPState._pre_forward``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.model.mesh_model import MeshModel
from mesh_megatron.platform import device


class Slice(NamedTuple):
    """This rank's rows of a parameter."""

    parameter: nn.Parameter
    """[rows of this rank, ...] in float32, in the memory of the model's parameter."""
    span: slice
    """Its range of elements in the flat parameter."""


class FullyShardedModel(nn.Module):
    """A model whose parameters, gradients and optimizer state are divided over all data-parallel ranks."""

    def __init__(self, config: TransformerConfig, module: MeshModel, parallel: ParallelConfig) -> None:
        super().__init__()
        self.config = config
        self.ddp_config = DistributedDataParallelConfig()  # Megatron-Core's optimizers read it
        self.group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        low = config.params_dtype if config.params_dtype != torch.float32 else None
        self.module = module.float()
        self._recompute(parallel)
        self._shard(low, parallel.num_distributed_optimizer_instances)
        for parameter in module.parameters():
            if isinstance(parameter, DTensor):
                mark: Any = parameter
                mark.slice, mark.low = _slice_of(parameter), low  # checkpoint/optimizer_state.py
                mark.copy_of_share = self.group.rank() // parallel.share_ranks(self.group.size())
                held_part(mark).shared = mark.copy_of_share > 0  # type: ignore[attr-defined]  # counted once in norms
        core: Any = module.core[0] if module.model.segments.shared and len(module.core) else None
        self._core = [] if core is None else list(core.layers)
        self._calls = 0
        self._last_micro_batch = True
        if core is not None:
            core.register_forward_hook(self._after_core)

    def _segments(self) -> Iterator[Any]:
        yield from (self.module.prelude, *self.module.core, self.module.coda)

    def _recompute(self, parallel: ParallelConfig) -> None:
        """Have the backward pass compute the layers again that full recomputation names."""
        for segment in self._segments():
            for layer in segment.layers[: parallel.recomputed_layers(len(segment.layers))]:
                layer.forward = partial(_computed_again, layer.forward)

    def _mesh(self, copies: int) -> DeviceMesh:
        kind = device.device().type
        if copies == 1:
            return DeviceMesh.from_group(self.group, kind)
        ranks = torch.tensor(dist.get_process_group_ranks(self.group)).view(copies, -1)
        return DeviceMesh(kind, ranks, mesh_dim_names=("copy", "share"))

    def _shard(self, low: torch.dtype | None, copies: int) -> None:
        mesh = self._mesh(copies)
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        complete = set(self.module.recurrence.parameters())
        for segment in self._segments():
            for layer in segment.layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        fully_shard(self.module, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=complete)
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        for parameter in complete:
            parameter.shared = self.group.rank() > 0  # counted once in norms

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Compute what the model computes; see ``MeshModel.forward``."""
        self._calls = 0
        self._reduce_core(False)
        return self.module(*inputs, **named)

    def _after_core(self, core: nn.Module, inputs: Any, output: Tensor) -> None:
        """Have the gradients of a shared core reduced in the backward pass of its first loop, which is the last."""
        if self._calls == 0 and output.requires_grad:
            output.register_hook(lambda _: self._reduce_core(self._last_micro_batch))
        self._calls += 1

    def _reduce_core(self, reduce: bool) -> None:
        for layer in self._core:
            layer.set_requires_gradient_sync(reduce, recurse=False)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Mark micro-batches before the last of a step."""
        self._last_micro_batch = False
        try:
            yield
        finally:
            self._last_micro_batch = True

    def zero_grad_buffer(self) -> None:
        """Drop all gradients."""
        for parameter in self.module.parameters():
            parameter.grad = None

    @torch.no_grad()
    def divide_gradients(self, tokens: Tensor) -> None:
        """Divide gradients by the ``tokens`` of all ranks, and hand them to the optimizer as ``main_grad``."""
        dist.all_reduce(tokens, group=self.group)
        factor = 1 / tokens.clamp(min=1).float()
        for parameter in self.module.parameters():
            gradient = parameter.grad
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            elif not isinstance(gradient, DTensor):
                dist.all_reduce(gradient, group=self.group)
            here = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            held_part(parameter).main_grad = here.mul_(factor)  # type: ignore[attr-defined]


def held_part(parameter: nn.Parameter) -> nn.Parameter:
    """Return the part of ``parameter`` that this rank updates."""
    sliced: Slice | None = getattr(parameter, "slice", None)
    return parameter if sliced is None else sliced.parameter


def sharded_state(module: Any) -> dict[str, Any]:
    """Return the sharded state of ``module``, whose entries hold its parameters themselves.

    Megatron-Core would take a fully sharded parameter for its local part, so it is shown complete ones without data.
    """
    originals: dict[int, Any] = {}
    held = [
        (owner._parameters, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if isinstance(parameter, DTensor)
    ]
    shown = {id(parameter): nn.Parameter(torch.empty(parameter.shape, device="meta")) for *_, parameter in held}
    try:
        for parameters, name, parameter in held:
            parameters[name] = shown[id(parameter)]
            originals[id(shown[id(parameter)])] = parameter
        state = module.sharded_state_dict()
    finally:
        for parameters, name, parameter in held:
            parameters[name] = parameter
    for entry in state.values():
        if id(getattr(entry, "data", None)) in originals:
            entry.data = originals[id(entry.data)]
    return state


def finish_gradients(chunks: list[FullyShardedModel], tokens: Tensor, *_: Any, **__: Any) -> None:
    """Finish the gradients of a step; Megatron-Core's schedules call it after the last backward pass."""
    for chunk in chunks:
        chunk.divide_gradients(tokens)


def _computed_again(forward: Any, *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)  # nothing is random


def _slice_of(parameter: Any) -> Slice:
    local, mesh = parameter.to_local().detach(), parameter.device_mesh
    shares = mesh.ndim - 1  # the axis of the mesh over which rows are divided
    rows, width = -(-parameter.shape[0] // mesh.size(shares)), prod(parameter.shape[1:])  # as torch.chunk cuts
    start = min(mesh.get_local_rank(shares) * rows, parameter.shape[0]) * width
    return Slice(nn.Parameter(local), slice(start, start + local.numel()))
