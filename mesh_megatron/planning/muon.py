"""Newton-Schulz steps of Muon (``training/muon.py``) in numbers: operations, and the matrices that ranks gather."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.rank_parameters import layers_of_rank

Shape = tuple[int, int]
"""Rows and columns of a complete matrix."""


class Orthogonalisation(NamedTuple):
    """Work of one rank in an update of all matrices that it holds."""

    flops: int
    """Operations of the matrix products (two per multiply-add), exact."""
    matrices: int
    elements: int
    """Values of the complete matrices, which tensor-parallel ranks gather in float32."""


def dense_work(run: RunConfig, stage: int) -> Orthogonalisation:
    """Return the work for attention, dense feed-forward layers and shared experts of a rank of pipeline ``stage``."""
    outside, cores = layers_of_rank(run.model, run.parallel, stage)
    shapes = list(_attention(run))
    core = shapes + list(_feed_forward(run, run.model.moe_shared_expert_intermediate_size or 0))
    if run.model.num_experts is None:
        core = shapes + list(_feed_forward(run, run.model.ffn_size))
    dense = shapes + list(_feed_forward(run, run.model.ffn_size))
    return _work(run, dense * outside + core * cores)


def expert_work(run: RunConfig, stage: int) -> Orthogonalisation:
    """Return the work for the routed experts of a rank of pipeline ``stage``."""
    model = run.model
    here = (model.num_experts or 0) // run.parallel.expert_model_parallel_size
    _, cores = layers_of_rank(model, run.parallel, stage)
    return _work(run, list(_feed_forward(run, model.expert_ffn_size)) * here * cores)


def newton_schulz_flops(shape: Shape, steps: int) -> int:
    """Return the operations on one matrix: X X^T, its square, and the product with X, in each step."""
    small, large = sorted(shape)
    return steps * (4 * small**2 * large + 2 * small**3)


def _work(run: RunConfig, matrices: list[list[Shape]]) -> Orthogonalisation:
    steps = run.training.muon_num_ns_steps
    parts = [part for matrix in matrices for part in matrix]
    flops = sum(newton_schulz_flops(part, steps) for part in parts)
    return Orthogonalisation(flops, len(matrices), sum(rows * columns for rows, columns in parts))


def _attention(run: RunConfig) -> Iterator[list[Shape]]:
    """Yield the matrices of an attention layer, each as the parts that are orthogonalised separately."""
    model = run.model
    queries, groups = model.num_attention_heads * model.head_size, model.query_groups * model.head_size
    joint = run.training.muon_no_split_qkv
    rows = [queries + 2 * groups] if joint else [queries, groups, groups]
    yield [(count, model.hidden_size) for count in rows]
    yield [(model.hidden_size, queries)]


def _feed_forward(run: RunConfig, width: int) -> Iterator[list[Shape]]:
    if width:
        yield [(width * (2 if run.model.swiglu else 1), run.model.hidden_size)]
        yield [(run.model.hidden_size, width)]
