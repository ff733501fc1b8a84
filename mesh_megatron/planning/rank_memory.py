"""Peak memory of every rank by kind: weights, gradients, optimizer state, activations, recurrence history."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mesh_megatron.config.layout import share
from mesh_megatron.config.loops import loops_without_gradients
from mesh_megatron.config.recurrence import FLOAT32
from mesh_megatron.config.ring import ChunkRole, ring_chunks
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.activations import ActivationSizes, activation_sizes, gradient_bytes
from mesh_megatron.planning.fully_sharded import gathered_bytes
from mesh_megatron.planning.pipeline_schedule import Pass, order_of_work
from mesh_megatron.planning.rank_parameters import RankParameters, rank_parameters, trained_parameters

MOMENTS = 2 * FLOAT32
"""Bytes per parameter of Adam's two moments."""
IN_TRANSIT = 4
"""States in buffers of the ring's overlapped messages: received early or not yet sent, forward and backward."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank at the memory peak of a step."""

    weights: int
    gradients: int
    """In float32, or with --grad-reduce-in-bf16 those of bfloat16 weights in bfloat16."""
    optimizer: int
    """AdamW's moments or Muon's momentum, and main weights unless the weights are float32; a share with the distributed
    optimizer."""
    activations: int
    """Kept by layers, loss and schedule for all micro-batches in flight."""
    history: int
    """Kept by state passing for these micro-batches, on the first rank of the ring."""
    working: int
    """Temporary: logits of a chunk of tokens, or a group of layers that is being recomputed; with fully sharded
    parameters what is gathered, at most."""
    in_flight: int
    """Number of forward passes at that peak whose backward pass has not run yet."""

    @property
    def total(self) -> int:
        kinds = (self.weights, self.gradients, self.optimizer, self.activations, self.history, self.working)
        return sum(kinds)


@dataclass(frozen=True)
class StateSizes:
    """Bytes that one rank holds from step to step."""

    weights: int
    gradients: int
    optimizer: int


def memory_of_ranks(run: RunConfig, vocabulary_rows: int, world_size: int, micro_batches: int) -> list[RankMemory]:
    """Return one entry per pipeline stage; all ranks of a stage need the same memory."""
    ring = run.parallel.pipeline_model_parallel_size
    sizes = activation_sizes(run, vocabulary_rows)
    return [_memory_of_rank(run, vocabulary_rows, world_size, micro_batches, stage, sizes) for stage in range(ring)]


def state_sizes(run: RunConfig, parameters: RankParameters, world_size: int) -> StateSizes:
    """Return bytes of weights, gradients and optimizer state (the mean of its shares, if distributed)."""
    parallel = run.parallel
    low = run.training.precision != "fp32"
    size, moments = 2 if low else FLOAT32, moment_bytes(run)
    kept = moments + (FLOAT32 if low else 0)
    replicas, expert_replicas = 1, 1
    if parallel.use_distributed_optimizer:
        stage = world_size // parallel.pipeline_model_parallel_size
        replicas = stage // parallel.tensor_model_parallel_size
        expert_replicas = stage // (parallel.expert_model_parallel_size * parallel.expert_tensor_size)
    matrices, expert_matrices = 0, 0
    if run.training.optimizer == "muon":  # keeps one moment of them
        matrices, expert_matrices = parameters.matrices, parameters.expert_matrices
    if parallel.use_torch_fsdp2:
        return _shares(parameters, parallel.share_ranks(world_size))
    weights = (parameters.dense + parameters.experts) * size + parameters.float32 * FLOAT32
    parameters = trained_parameters(run.model, parameters)
    shared = parameters.dense * kept + parameters.float32 * moments - matrices * MOMENTS // 2
    experts = parameters.experts * kept - expert_matrices * MOMENTS // 2
    return StateSizes(
        weights=weights,
        gradients=(parameters.dense + parameters.experts) * gradient_bytes(run) + parameters.float32 * FLOAT32,
        optimizer=-(-shared // replicas) - (-experts // expert_replicas),
    )


def moment_bytes(run: RunConfig) -> int:
    """Return the bytes of moments per parameter: two, of SGD one; of Muon's matrices one less than this says."""
    return MOMENTS // 2 if run.training.optimizer == "sgd" else MOMENTS


def _shares(parameters: RankParameters, ranks: int) -> StateSizes:
    """Return the mean bytes of a rank with fully sharded parameters: all in float32, the recurrence's complete."""
    held = -(-parameters.dense // ranks) + parameters.float32
    return StateSizes(weights=held * FLOAT32, gradients=held * FLOAT32, optimizer=held * MOMENTS)


def layers_of_chunk(run: RunConfig, stage: int, role: ChunkRole) -> tuple[int, int]:
    """Return the number of dense and of core layers that a rank runs in a chunk."""
    count = len(share(role.layers(run.model.segments), stage, run.parallel.pipeline_model_parallel_size))
    return (0, count) if role.segment == "core" else (count, 0)


def keeping_all(run: RunConfig) -> RunConfig:
    """Return the same run without recomputation."""
    return replace(run, parallel=replace(run.parallel, recompute_granularity=None))


def _memory_of_rank(
    run: RunConfig, vocabulary: int, world_size: int, micro_batches: int, stage: int, sizes: ActivationSizes
) -> RankMemory:
    ring = run.parallel.pipeline_model_parallel_size
    roles = ring_chunks(run.model)
    parameters = rank_parameters(run.model, run.parallel, vocabulary, stage)
    held = state_sizes(run, parameters, world_size)
    kept = [_kept_by_chunk(run, stage, chunk, sizes) for chunk in range(len(roles))]
    recomputed = max(
        _at_once(run, role) * sizes.recomputed(*layers_of_chunk(run, stage, role), chunk)
        for chunk, role in enumerate(roles)
    )
    history = [0] * len(roles)
    if stage == 0:
        history[: len(sizes.history)] = sizes.history
    if ring == 1:
        kept, history = [sum(kept)], [sum(history)]
    work = order_of_work(ring, stage, len(kept), micro_batches)
    deferred = sizes.deferred if stage == 0 and ring > 1 else 0
    of_keys = sizes.keys * layers_of_chunk(run, stage, roles[1])[1] if ring > 1 else 0
    activations, passed, in_flight = _fullest_moment(work, kept, history, deferred, of_keys, run.model.segments.loops)
    return RankMemory(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=activations + (IN_TRANSIT * sizes.state if ring > 1 else 0),
        history=passed,
        working=max(recomputed, sizes.logits if stage == ring - 1 else 0)
        + (gathered_bytes(run, vocabulary) if run.parallel.use_torch_fsdp2 else 0),
        in_flight=in_flight,
    )


def _at_once(run: RunConfig, role: ChunkRole) -> int:
    """Return how many states of a micro-batch run through a chunk at once: all that the coda reads, without a ring."""
    alone = run.parallel.pipeline_model_parallel_size == 1
    return run.model.losses_per_token if alone and role.segment == "coda" else 1


def _kept_by_chunk(run: RunConfig, stage: int, chunk: int, sizes: ActivationSizes) -> int:
    """Return the bytes that a chunk keeps, without history.

    On a ring, the schedule also keeps a chunk's output until its backward pass.
    """
    ring, roles = run.parallel.pipeline_model_parallel_size, ring_chunks(run.model)
    dense, core = layers_of_chunk(run, stage, roles[chunk])
    without_graph = 1 <= chunk <= loops_without_gradients(run.model.segments.loops, run.loops.backprop_loops)
    without_graph = without_graph or run.model.exit_gate_only
    kept = 0 if without_graph else sizes.kept(dense, core, chunk)
    if chunk == 0 and stage == 0:
        kept += sizes.tokens
    if chunk == 0 or ring > 1:  # each chunk of a ring takes its own to the GPU
        kept += sizes.mask
    if chunk == run.model.segments.loops + 1 and stage == 0:
        kept += sizes.gate
    if chunk == len(roles) - 1 and stage == ring - 1:
        return kept + sizes.head + (sizes.state if without_graph and ring > 1 else 0)
    if ring == 1:
        return kept
    # A chunk without layers, or without a graph, keeps its input too.
    empty = (dense + core == 0 or without_graph) and (stage > 0 or chunk > 0)
    return kept + sizes.state * (2 if empty else 1)


def _fullest_moment(
    work: list[Pass], kept: list[int], history: list[int], deferred: int, of_keys: int, loops: int
) -> tuple[int, int, int]:
    """Return activations, history and passes in flight at the peak of activations plus history.

    The backward pass of every chunk from 2 to that after the last loop adds ``deferred``; that of the last loop adds
    ``of_keys``, gradients of keys and values that loops share; the backward pass of chunk 1 releases all of it.
    """
    activations = passed = in_flight = 0
    fullest = (0, 0, 0)
    for kind, chunk, _ in work:
        sign = 1 if kind == "F" else -1
        activations += sign * kept[chunk]
        passed += sign * history[chunk]
        in_flight += sign
        if kind == "B" and 0 < chunk <= loops + 1:
            passed += deferred * (1 if chunk > 1 else -loops)
            activations += of_keys * ((chunk == loops) - (chunk == 1))
        if activations + passed > fullest[0] + fullest[1]:
            fullest = (activations, passed, in_flight)
    return fullest
