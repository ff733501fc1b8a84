"""Costs of low-rank differences of loops (``--loop-lora-rank`` R): W_t = W + B_t A_t in every linear layer of the core.

A is [R, inputs] and B [outputs, R], for each of the K loops. Without the flag R is 0, and so are all numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class LinearWidths:
    """Widths of the linear layers of one branch on one tensor-parallel rank."""

    inputs: int
    """Inputs of the first, which ranks split by columns: each rank has all of them."""
    columns: int
    """This rank's outputs of the first."""
    rows: int
    """This rank's inputs of the second, which ranks split by rows."""
    outputs: int
    """Outputs of the second."""

    @property
    def total(self) -> int:
        return self.inputs + self.columns + self.rows + self.outputs


def branch_widths(model: ModelConfig, tensor: int = 1, own_keys: bool = True) -> tuple[LinearWidths, LinearWidths]:
    """Return the widths of attention's and of the feed-forward layer's linear layers.

    Without ``own_keys`` the first computes queries alone.
    """
    hidden, heads = model.hidden_size, model.num_attention_heads * model.head_size // tensor
    ffn = model.ffn_size // tensor
    queries_keys_values = heads + (2 * model.query_groups * model.head_size // tensor if own_keys else 0)
    return (
        LinearWidths(inputs=hidden, columns=queries_keys_values, rows=heads, outputs=hidden),
        LinearWidths(inputs=hidden, columns=ffn * (2 if model.swiglu else 1), rows=ffn, outputs=hidden),
    )


def low_rank_parameters(model: ModelConfig, tensor: int = 1) -> int:
    """Count those of one core layer, of all loops, on one of ``tensor`` ranks."""
    rank = model.loop_lora_rank or 0
    return model.segments.loops * rank * sum(branch.total for branch in branch_widths(model, tensor))


def low_rank_macs(model: ModelConfig, own_keys: bool = True) -> tuple[int, int]:
    """Return the forward multiply-adds per token of a core layer's attention and feed-forward layer in one loop."""
    branches = branch_widths(model, own_keys=own_keys)
    attention, feed_forward = (branch.total * (model.loop_lora_rank or 0) for branch in branches)
    return attention, feed_forward


@dataclass(frozen=True)
class LowRankCalls:
    """Collectives of one core layer in one micro-batch, beside those of its states."""

    calls: int
    sent: int
    """Values that a rank sends."""


def low_rank_collectives(run: RunConfig, backward: bool = True) -> LowRankCalls:
    """Count the calls over tensor-parallel ranks in the forward pass, and with ``backward`` in both passes.

    A x [S, B, R] is gathered for column-parallel layers and summed for row-parallel ones, or its gradient is. Branches
    of a parallel residual that share their collectives need none with sequence parallelism; without it they sum
    the gradients of A x and of B.
    """
    model, parallel = run.model, run.parallel
    backward = backward and not model.exit_gate_only
    tensor, rank = parallel.tensor_model_parallel_size, model.loop_lora_rank or 0
    if tensor == 1 or not rank:
        return LowRankCalls(0, 0)
    low = model.seq_length // parallel.context_parallel_size * run.training.micro_batch_size * rank
    again = 1 if backward and parallel.recompute_granularity == "full" else 0
    branches = 2 * (1 + again) + (1 if backward and parallel.recomputes("mlp") else 0)  # run forward, in both passes
    share = (tensor - 1) / tensor
    if parallel.sequence_parallel:
        calls = 0 if model.joint_branches else 2 * branches + (4 if backward else 0)
        return LowRankCalls(calls, round(calls * low * share))
    if model.joint_branches:
        calls, values = (4, 2 * low + 2 * model.hidden_size * rank) if backward else (0, 0)
    else:
        calls = branches + (2 if backward else 0)
        values = calls * low
    return LowRankCalls(calls, round(2 * values * share))
