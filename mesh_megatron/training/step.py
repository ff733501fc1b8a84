"""One training step and one evaluation batch, run through Megatron-Core's forward-backward schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mesh_megatron.model.exits import further_sums, measures
from mesh_megatron.parallel.build_model import RankModel
from mesh_megatron.parallel.context import part_of_sequences
from mesh_megatron.platform import device
from mesh_megatron.training.expert_bias import forget_routed_tokens, update_expert_biases
from mesh_megatron.training.fault_tolerance.rerun import Reruns, once
from mesh_megatron.training.metrics.moe_metrics import mean_auxiliary_losses, weighed_micro_batches
from mesh_megatron.training.metrics.parameter_measures import parameter_measures
from mesh_megatron.training.metrics.timers import timed
from mesh_megatron.training.optimizer import Update, update_weights

Batch = dict[str, Tensor]
# In the order of a chunk's arguments.
_INPUTS = ("tokens", "attention_mask", "labels", "loss_mask", "token_numbers")


@dataclass(frozen=True)
class StepResult:
    """The outcome of one step; the same on every rank except for ``micro_batch_losses``."""

    loss: float
    """Mean cross-entropy per token, in nats; with losses after every loop the mean that exits or weights make of it."""
    update: Update
    auxiliary_losses: dict[str, float] = field(default_factory=dict)
    """Auxiliary losses of the mixture of experts, by Megatron-LM's names; see ``metrics/moe_metrics.py``."""
    exits: dict[str, float] = field(default_factory=dict)
    """Measures of losses after every loop, by log key; see ``model/exits.py``."""
    measures: dict[str, float] = field(default_factory=dict)
    """Measures of the parameters, if asked for; see ``metrics/parameter_measures.py``."""
    spike: bool = False
    """True if the loss was a spike; see ``loss_spike.py``."""
    micro_batch_losses: Tensor | None = None
    """[micro-batches, 2 or more]: summed loss and tokens, then what ``exits.outcome`` adds; on the first
    tensor-parallel ranks of the last stage."""

    @property
    def finite(self) -> bool:
        """True if loss and gradient held no NaN or infinity; an overflow that lowers the loss scale does not count."""
        return self.update.skipped != "not finite"

    @property
    def passed_over(self) -> bool:
        """True if ``--iterations-to-skip`` named the step, so that nothing was computed."""
        return self.update.skipped == "passed over"

    @property
    def bad(self) -> bool:
        """True if weights were not updated because of a loss or gradient that is not finite, or a spike."""
        return self.update.skipped in ("not finite", "spike")


PASSED_OVER = StepResult(math.nan, Update(math.nan, "passed over"))


@dataclass(frozen=True)
class StepRules:
    """Rules of a step for spikes, requests to stop, and suspicious losses."""

    is_spike: Callable[[float], bool] = lambda loss: False
    """Called with the step's mean loss, before the update."""
    skip_spikes: bool = False
    """Skip the update of a step whose loss is a spike."""
    stop: Callable[[], int] = lambda: 0
    """Return this rank's reason to stop; called before the update, in which the ranks agree (``Update.stop``)."""
    log_params_norm: bool = False
    """Measure the norm of all weights after an update."""
    log_zeros: bool = False
    """Count the zeros in all gradients of an update."""
    reruns: Reruns | None = None
    """May compute forward and backward again."""


def train_step(
    model: RankModel,
    optimizer: MegatronOptimizer,
    batches: Iterator[Batch] | None,
    micro_batches: int,
    micro_batch_size: int,
    rules: StepRules = StepRules(),  # noqa: B008 (frozen)
) -> StepResult:
    """Run forward and backward over ``micro_batches``, then update once unless loss or gradient is not finite.

    ``batches`` yields this rank's micro-batches of ``micro_batch_size`` sequences; None on ranks that need no data (the
    middle of a pipeline), except the numbers of tokens for dropout.
    """
    reruns = rules.reruns
    for attempt in reruns.attempts(batches) if reruns is not None else once(batches):
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        forget_routed_tokens(model)
        weighed = weighed_micro_batches(model, attempt, micro_batches)
        sums, by_micro_batch = _summed_loss(
            model, weighed, micro_batches, micro_batch_size, forward_only=False,
            validate=reruns.validate if reruns is not None else None,
        )  # fmt: skip
    total, tokens, *of_exits = sums
    loss = mean(total, tokens)
    exits = measures(model.model, [loss, *(mean(each, tokens) for each in of_exits)]) if of_exits else {}
    auxiliary = mean_auxiliary_losses(model, micro_batches)
    spike = rules.is_spike(loss)
    if not math.isfinite(loss):
        update = Update(math.nan, "not finite")
    elif spike and rules.skip_spikes:
        update = Update(math.nan, "spike")
    else:
        with timed(model.config, "optimizer", 1):
            update = update_weights(optimizer, rules.stop())
    if update.applied:
        update_expert_biases(model)
    norm, zeros = rules.log_params_norm and update.applied, rules.log_zeros and update.applied
    of_parameters = parameter_measures(optimizer, norm, zeros)
    return StepResult(loss, update, auxiliary, exits, of_parameters, spike, by_micro_batch)


@torch.no_grad()
def evaluation_sums(
    model: RankModel, batches: Iterator[Batch] | None, micro_batches: int, micro_batch_size: int
) -> tuple[float, float]:
    """Return cross-entropy (nats) and tokens, both summed over ``micro_batches`` of every data-parallel rank."""
    model.train(False)
    timers, model.config.timers = model.config.timers, None  # they time steps
    try:
        loss, tokens = _summed_loss(model, batches, micro_batches, micro_batch_size, forward_only=True)[0]
        return loss, tokens
    finally:
        model.config.timers = timers
        model.train(True)


def _summed_loss(
    model: RankModel,
    batches: Iterator[Batch] | None,
    micro_batches: int,
    micro_batch_size: int,
    forward_only: bool,
    validate: Callable[[Tensor], None] | None = None,
) -> tuple[list[float], Tensor | None]:
    """Run the schedule and return loss, tokens and more summed over the global batch, and this rank's by micro-batch.

    ``validate`` is called with the summed loss of every micro-batch.
    """
    chunks = model.running
    count = len(chunks)
    streams: Any = [None] * count
    if batches is not None:
        streams = list(itertools.tee(itertools.islice(batches, micro_batches), count))
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, validate),
        data_iterator=streams if count > 1 else streams[0],
        model=chunks if count > 1 else chunks[0],
        num_microbatches=micro_batches,
        seq_length=model.seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    exits = model.model.losses_after_loops and not forward_only
    totals = torch.zeros(2 + (further_sums(model.loops) if exits else 0), dtype=torch.float64, device=device.device())
    by_micro_batch = None
    if outputs and parallel_state.get_tensor_model_parallel_rank() == 0:
        by_micro_batch = torch.stack(outputs)
        totals += by_micro_batch.sum(0)
    dist.all_reduce(totals)
    return totals.tolist(), by_micro_batch


def mean(loss: float, tokens: float) -> float:
    """Return the loss per token; NaN if there are no tokens."""
    return loss / tokens if tokens else math.nan


def _forward_step(
    validate: Callable[[Tensor], None] | None, stream: Iterator[Batch] | None, chunk: torch.nn.Module
) -> tuple[Tensor, Callable]:
    """Run one chunk on one micro-batch for Megatron-Core's schedules; return its output and loss function."""
    if stream is None:
        return chunk(None), _no_loss
    with timed(chunk.config, "batch-generator", 2):
        read = next(stream)
    batch = {name: read[name].to(device.device(), non_blocking=True) for name in _INPUTS if name in read}
    batch = part_of_sequences(batch)
    output = chunk(*(batch.get(name) for name in _INPUTS))
    if "loss_mask" not in batch:
        return output, _no_loss
    loss = partial(_loss, batch["loss_mask"])
    return output, partial(_validated, validate, loss) if validate is not None else loss


def _loss(mask_BS: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss to differentiate, its number of tokens, and the sums to log in float64.

    ``output`` is that loss, or with losses after every loop what ``exits.outcome`` returns.
    """
    tokens = mask_BS.sum().to(torch.int)
    if output.dim() == 0:
        return output, tokens, torch.stack([output.detach().double(), tokens.double()])
    logged = output[1:].detach().double()
    return output[0], tokens, torch.cat([logged[:1], tokens.double()[None], logged[1:]])


def _validated(validate: Callable[[Tensor], None], loss: Callable, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    result = loss(total)
    validate(result[0])
    return result


def _no_loss(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise AssertionError("the last stage of the pipeline must read data")
