"""Bytes that a rank sends per step, by reason and link, in closed form.

Collectives are counted as ring algorithms: for n bytes over g ranks, each rank sends n (g - 1) / g in an all-gather,
reduce-scatter or all-to-all, and twice that in an all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mesh_megatron.config.recurrence import FLOAT32
from mesh_megatron.config.ring import ring_chunks
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.activations import gradient_bytes, value_bytes
from mesh_megatron.planning.fully_sharded import StepTraffic, step_traffic
from mesh_megatron.planning.low_rank import low_rank_collectives
from mesh_megatron.planning.rank_memory import keeping_all, layers_of_chunk
from mesh_megatron.planning.rank_parameters import rank_parameters, trained_parameters

Link = Literal["nvlink", "network"]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Messages that the busiest rank sends for one reason."""

    reason: str
    link: Link
    """Slowest link involved, given Megatron-Core's order of ranks: tensor, context, data, pipeline."""
    messages: int
    """Calls per step: point-to-point sends, or collectives."""
    bytes_sent: int
    """Bytes sent by this rank, in all of these calls."""


@dataclass(frozen=True)
class Collectives:
    """Collective calls of one layer over its tensor-parallel ranks; each one moves one complete [S, B, D] tensor."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    def sent(self, tensor_bytes: int, ranks: int) -> int:
        share = tensor_bytes * (ranks - 1) // ranks
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * share

    @property
    def calls(self) -> int:
        return self.all_reduce + self.all_gather + self.reduce_scatter


def hop_bytes(run: RunConfig) -> int:
    """Return the bytes of one [S, B, D] tensor as ranks send it along the ring."""
    parallel, size = run.parallel, value_bytes(run)
    split = parallel.context_parallel_size
    split *= parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return run.model.seq_length // split * run.training.micro_batch_size * run.model.hidden_size * size


def hops_of_ranks(run: RunConfig, micro_batches: int) -> list[int]:
    """Return the number of tensors that each pipeline stage sends per step: 2 m (P c - 1) in total for c chunks."""
    ring, chunks = run.parallel.pipeline_model_parallel_size, len(ring_chunks(run.model))
    if ring == 1:
        return [0]
    return [micro_batches * (2 * chunks - (stage == 0) - (stage == ring - 1)) for stage in range(ring)]


def layer_collectives(run: RunConfig, experts: bool = False, backward: bool = True) -> Collectives:
    """Count the collectives of one layer over tensor-parallel ranks: forward pass, and with ``backward`` both passes.

    A layer with frozen weights (``--exit-gate-only``) has no backward pass.
    Full recomputation repeats those of the forward pass, that of feed-forward layers theirs. The branches of a parallel
    residual share their collectives; in layers of Transformer Engine only those of their outputs.
    """
    parallel, backward = run.parallel, backward and not run.model.exit_gate_only
    if parallel.tensor_model_parallel_size == 1:
        return Collectives()
    shared = run.model.moe_shared_expert_intermediate_size is not None
    branches = 1 if experts and not shared else 2  # experts exchange tokens separately
    apart = parallel.transformer_impl == "transformer_engine" or run.fp8.fp8_format is not None
    outputs = 1 if run.model.joint_branches and not experts else branches
    inputs = branches if apart else outputs
    passes = 0 if not backward else 2 if parallel.recompute_granularity == "full" else 1
    forward_runs, backward_runs = max(1, passes), min(1, passes)
    mlp_again = backward and (
        parallel.recomputes("moe" if experts else "mlp") or (experts and parallel.recomputes("shared_experts"))
    )
    output_again, input_again = int(mlp_again and outputs == 2), int(mlp_again and inputs == 2)
    if not parallel.sequence_parallel:
        return Collectives(all_reduce=outputs * forward_runs + branches * backward_runs + output_again)
    # gathered: inputs, inputs again for the weights' gradients, the outputs' gradients
    return Collectives(
        all_gather=inputs * (forward_runs + backward_runs) + outputs * backward_runs + input_again,
        reduce_scatter=outputs * forward_runs + inputs * backward_runs + output_again,
    )


@dataclass(frozen=True, kw_only=True)
class ExpertBytes:
    """Bytes that a rank sends in one forward pass of a layer with experts; the backward pass sends as much.

    Only the tokens' states are counted, spread evenly over experts; routing weights and counts are small.
    """

    moved: int
    """All-to-all to the experts' ranks; as much is sent back."""
    gathered: int
    """All-gather among the ranks that share an expert's matrices: each needs the tokens of all."""
    scattered: int
    """Reduce-scatter of their partial outputs, in float32, the type of the router's weights."""


def expert_bytes(run: RunConfig) -> ExpertBytes:
    """Return the bytes that a rank sends in one forward pass of a layer with experts."""
    ranks, tensor = run.parallel.expert_model_parallel_size, run.parallel.expert_tensor_size
    size = value_bytes(run)
    copies = hop_bytes(run) * run.model.moe_router_topk
    return ExpertBytes(
        moved=copies * (ranks - 1) // ranks,
        gathered=copies * (tensor - 1),
        scattered=copies // size * FLOAT32 * (tensor - 1),
    )


def traffic_of_step(
    run: RunConfig, vocabulary_rows: int, world_size: int, micro_batches: int, gpus_per_node: int = 8
) -> list[Traffic]:
    """Return every kind of message of the busiest rank; kinds without messages are left out."""
    parallel = run.parallel
    tensor, ring = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    stage_size = world_size // ring
    replicas = stage_size // tensor
    state = hop_bytes(run)
    whole = state * (tensor if parallel.sequence_parallel else 1)
    (dense, core), again = _busiest_layers(run), _busiest_layers(run, recomputed=True)
    layers, plain = (dense, core), keeping_all(run) if run.parallel.recompute_granularity == "full" else run
    rows: list[Traffic] = []

    def add(reason: str, span: int, messages: int, sent: int) -> None:
        if messages and sent:
            link: Link = "nvlink" if span <= gpus_per_node else "network"
            rows.append(Traffic(reason=reason, link=link, messages=messages, bytes_sent=sent))

    hops = max(hops_of_ranks(run, micro_batches))
    add("ring hops [S, B, D]", world_size, hops, hops * state)
    for experts, count, repeated in zip((False, run.model.num_experts is not None), layers, again, strict=True):
        both = (layer_collectives(run, experts), repeated), (layer_collectives(plain, experts), count - repeated)
        name = "tensor parallel, core layers" if experts else "tensor parallel, layers"
        messages = sum(calls.calls * times for calls, times in both) * micro_batches
        add(name, tensor, messages, sum(calls.sent(whole, tensor) * times for calls, times in both) * micro_batches)
    both_costs = (low_rank_collectives(run), again[1]), (low_rank_collectives(plain), core - again[1])
    messages = sum(costs.calls * times for costs, times in both_costs) * micro_batches
    sent = sum(costs.sent * times for costs, times in both_costs) * micro_batches * value_bytes(run)
    add("tensor parallel, low-rank differences", tensor, messages, sent)
    _add_context(run, add, sum(layers) * micro_batches, sum(again) * micro_batches)
    _add_experts(run, add, layers[1] * micro_batches, again[1] * micro_batches)
    held = [rank_parameters(run.model, parallel, vocabulary_rows, stage) for stage in range(ring)]
    parameters = max((trained_parameters(run.model, of_rank) for of_rank in held), key=lambda p: p.total)
    size = value_bytes(run)
    expert_replicas = stage_size // (parallel.expert_model_parallel_size * parallel.expert_tensor_size)
    shared = parameters.dense + parameters.float32
    shares = [("", shared, replicas), (" of experts", parameters.experts, expert_replicas)]
    if parallel.use_torch_fsdp2:
        _add_fully_sharded(run, step_traffic(run, vocabulary_rows, micro_batches), add, world_size)
        return rows
    for of, count, ranks in shares:
        share = count * (ranks - 1) // ranks
        if run.slices_optimizer:
            add(f"data parallel, gradients{of} (reduce-scatter)", stage_size, 1, share * gradient_bytes(run))
        else:
            add(f"data parallel, gradients{of} (all-reduce)", stage_size, 1, 2 * share * gradient_bytes(run))
        if parallel.use_distributed_optimizer:
            add(f"data parallel, weights{of} (all-gather)", stage_size, 1, share * size)
    return rows


def _add_fully_sharded(
    run: RunConfig, traffic: StepTraffic, add: Callable[[str, int, int, int], None], world_size: int
) -> None:
    ranks, copies = run.parallel.share_ranks(world_size), run.parallel.num_distributed_optimizer_instances
    sent = traffic.gathered * (ranks - 1) // ranks, traffic.reduced * (ranks - 1) // ranks
    add("data parallel, weights (all-gather)", ranks, traffic.gathers, sent[0])
    add("data parallel, gradients (reduce-scatter)", ranks, traffic.reductions, sent[1])
    between = 2 * (traffic.reduced // ranks) * (copies - 1) // copies
    add("data parallel, gradients of copies (all-reduce)", world_size, traffic.reductions, between)


def _busiest_layers(run: RunConfig, recomputed: bool = False) -> tuple[int, int]:
    """Return the numbers of dense and of core layers that the busiest rank computes per micro-batch.

    With ``recomputed``, only those that its backward pass computes again.
    """
    ring, roles = run.parallel.pipeline_model_parallel_size, ring_chunks(run.model)
    held = [[layers_of_chunk(run, stage, role) for role in roles] for stage in range(ring)]
    busiest = max(held, key=lambda chunks: sum(dense + core for dense, core in chunks))
    if recomputed:
        again = (lambda layers: 0) if run.model.exit_gate_only else run.parallel.recomputed_layers
        busiest = [(again(dense), again(core)) for dense, core in busiest]
    return sum(dense for dense, _ in busiest), sum(core for _, core in busiest)


def _add_context(run: RunConfig, add: Callable[[str, int, int, int], None], layers: int, again: int) -> None:
    """Add keys and values: an all-gather in the forward pass, a reduce-scatter in the backward pass."""
    parallel, model = run.parallel, run.model
    ranks, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if ranks == 1:
        return
    size = value_bytes(run)
    part = model.seq_length // ranks * run.training.micro_batch_size * model.query_groups * model.head_size // tensor
    passes = 1 if model.exit_gate_only else 2
    calls = 2 * (passes * layers + (layers if passes == 2 and parallel.recomputes("core_attn") else again))
    add("context parallel, keys and values", tensor * ranks, calls, calls * part * size * (ranks - 1))


def _add_experts(run: RunConfig, add: Callable[[str, int, int, int], None], layers: int, again: int) -> None:
    """Add the tokens sent to experts and back, forward and backward."""
    parallel = run.parallel
    if run.model.num_experts is None:
        return
    tensor, passes = parallel.expert_tensor_size, 2 * layers + (layers if parallel.recomputes("moe") else again)
    sent, calls = expert_bytes(run), 2 * passes
    # ranks that share experts are consecutive, expert-tensor ranks first
    add("expert parallel, tokens (all-to-all)", parallel.expert_model_parallel_size * tensor, calls, calls * sent.moved)
    there_and_back = sent.gathered + sent.scattered
    add("expert tensor parallel, tokens", tensor, calls, passes * there_and_back)
