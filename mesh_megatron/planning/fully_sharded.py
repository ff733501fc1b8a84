"""Fully sharded data parallelism (``parallel/fully_sharded.py``) in numbers: what a rank gathers and reduces."""

from __future__ import annotations

from typing import NamedTuple

from mesh_megatron.config.recurrence import FLOAT32
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.activations import value_bytes
from mesh_megatron.planning.rank_parameters import layer_parameters_of_rank, rank_parameters


class StepTraffic(NamedTuple):
    """Collectives of a step over all data-parallel ranks."""

    gathers: int
    """All-gathers: of every layer, each time it computes, forward and backward, and of embedding and head."""
    gathered: int
    """Bytes of the complete weights that they gather, in the run's precision."""
    reductions: int
    """Reduce-scatters: per micro-batch, but of a shared core once."""
    reduced: int
    """Bytes of the complete gradients that they reduce, in float32."""


def step_traffic(run: RunConfig, vocabulary: int, micro_batches: int) -> StepTraffic:
    """Return the collectives of one step."""
    layout = run.model.segments
    layer, core_layer, ends = _sizes(run, vocabulary)
    outside, loops = layout.prelude + layout.coda, layout.core * layout.loops
    shared = layout.shared and layout.loops > 0
    inside = layout.core if shared else loops * micro_batches
    return StepTraffic(
        gathers=2 * micro_batches * (outside + loops + 1),
        gathered=2 * micro_batches * (outside * layer + loops * core_layer + ends) * value_bytes(run),
        reductions=micro_batches * (outside + 1) + inside,
        reduced=(micro_batches * (outside * layer + ends) + inside * core_layer) * FLOAT32,
    )


def gathered_bytes(run: RunConfig, vocabulary: int) -> int:
    """Return the bytes that a rank holds at most, beside its share, while layers compute.

    Embedding and head stay gathered during a pass, one layer is and the next may be. Gradients of a shared core wait
    for the end of the step, those of one layer and of the ends while they are reduced, in float32.
    """
    layer, core_layer, ends = _sizes(run, vocabulary)
    largest = max(layer, core_layer)
    core = run.model.segments.core * core_layer * run.model.segments.shared
    return (ends + 2 * largest) * value_bytes(run) + (ends + core + largest) * FLOAT32


def _sizes(run: RunConfig, vocabulary: int) -> tuple[int, int, int]:
    """Return the parameters of a layer, of a core layer, and of embedding, final norm and output matrix together."""
    layout = run.model.segments
    layer, core_layer = (layer_parameters_of_rank(run.model, run.parallel, core) for core in (False, True))
    layers = (layout.prelude + layout.coda) * layer + layout.unique_core_layers * core_layer
    return layer, core_layer, rank_parameters(run.model, run.parallel, vocabulary, 0).dense - layers
