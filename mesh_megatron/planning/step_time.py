"""Predicted time of a step: the simulated pipeline schedule, then gradient reduction, optimizer and weight gathering.

With --overlap-grad-reduce, the gradient collective is assumed to overlap with the backward pass of one micro-batch
through each unique layer (a shared core's gradients are complete only after its first loop, whose backward pass comes
last). With --overlap-param-gather, the weight collective overlaps with such a forward pass. Only the remainder counts.
Not included: the embedding, gradients of tied tables, the loss's small collectives, data loading, evaluation and
checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mesh_megatron.config.layout import share
from mesh_megatron.config.loops import loops_without_gradients
from mesh_megatron.config.recurrence import FLOAT32
from mesh_megatron.config.ring import ring_chunks
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.activations import gradient_bytes
from mesh_megatron.planning.compute import Compute, Passes, Time
from mesh_megatron.planning.fully_sharded import step_traffic
from mesh_megatron.planning.hardware import Links
from mesh_megatron.planning.muon import dense_work, expert_work
from mesh_megatron.planning.pipeline_schedule import RingTimes, Task, bubble, order_of_work, replay
from mesh_megatron.planning.rank_memory import MOMENTS, keeping_all, layers_of_chunk, moment_bytes
from mesh_megatron.planning.rank_parameters import rank_parameters, trained_parameters
from mesh_megatron.planning.traffic import hop_bytes

ADAM_TRAFFIC = 8 * FLOAT32
"""Bytes per parameter: gradient read twice (norm, update), main weight and two moments read and written."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step."""

    ring: float
    """Forward and backward passes of all micro-batches, including waiting."""
    bubble: float
    """Share of ``ring`` that ranks spend waiting, averaged over ranks."""
    busiest: Time
    """Work of the busiest rank during ``ring``."""
    gradients: float
    """Gradient reduction over data-parallel ranks that is not overlapped."""
    optimizer: float
    weights: float
    """Gathering of updated weights that is not overlapped."""

    @property
    def total(self) -> float:
        return self.ring + self.gradients + self.optimizer + self.weights

    def by_reason(self) -> dict[str, float]:
        """Return the seconds of the busiest rank by kind of work or waiting; they add up to ``total``."""
        return {
            "matrix products": self.busiest.products,
            "attention": self.busiest.attention,
            "memory-bound operations": self.busiest.memory,
            "messages inside layers": self.busiest.messages,
            "starting kernels": self.busiest.launches,
            "waiting for the ring": self.ring - self.busiest.total,
            "gradients, not hidden": self.gradients,
            "optimizer": self.optimizer,
            "weights, not hidden": self.weights,
        }


class StepModel:
    """Step time of one run: a cheap lower bound (``least``), and the simulated schedule (``simulated``)."""

    def __init__(self, run: RunConfig, vocabulary_rows: int, world_size: int, micro_batches: int, links: Links) -> None:
        self.run, self.rows, self.world_size, self.micro_batches = run, vocabulary_rows, world_size, micro_batches
        self.links, self.compute = links, Compute(run, vocabulary_rows, links)
        full = run.parallel.recompute_granularity == "full"
        self.kept = Compute(keeping_all(run), vocabulary_rows, links) if full else self.compute
        self.ring = run.parallel.pipeline_model_parallel_size
        self.roles = ring_chunks(run.model)

    @cached_property
    def passes(self) -> list[list[Passes]]:
        """Times ``passes[stage][chunk]``; without a pipeline there is one chunk, the complete model."""
        held = [[self._passes(stage, chunk) for chunk in range(len(self.roles))] for stage in range(self.ring)]
        return held if self.ring > 1 else [[_joined(held[0])]]

    @cached_property
    def busiest(self) -> Time:
        """Work of the busiest rank in a step, without waiting."""
        sums = [_joined(chunks) for chunks in self.passes]
        return max(((one.forward + one.backward) * self.micro_batches for one in sums), key=lambda time: time.total)

    @cached_property
    def afterwards(self) -> tuple[float, float, float]:
        """Seconds of gradients, optimizer and weights, at the pipeline stage where their sum is longest."""
        return max((self._afterwards(stage) for stage in range(self.ring)), key=sum)

    @property
    def least(self) -> float:
        """Lower bound of the step time under any schedule, in seconds."""
        return self.busiest.total + sum(self.afterwards)

    def timeline(self) -> list[Task]:
        """Simulate every pass of the ring; times in seconds."""
        work = [order_of_work(self.ring, stage, len(self.roles), self.micro_batches) for stage in range(self.ring)]
        size = hop_bytes(self.run)
        inside = [self.links.hop_is_inside(stage, self.ring, self.world_size) for stage in range(self.ring)]
        times = RingTimes(
            forward=[[one.forward.total for one in chunks] for chunks in self.passes],
            backward=[[one.backward.total for one in chunks] for chunks in self.passes],
            hops=[self.links.hop(size, here) for here in inside],
            overlapped=self.run.parallel.overlap_p2p,
        )
        return replay(work, times)

    def simulated(self) -> StepTime:
        """Return the step time from a simulation of the schedule."""
        gradients, optimizer, weights = self.afterwards
        ring, waiting = self.busiest.total, 0.0
        if self.ring > 1:
            tasks = self.timeline()
            ring, waiting = max(task.stop for task in tasks), bubble(tasks)
        return StepTime(
            ring=ring, bubble=waiting, busiest=self.busiest, gradients=gradients, optimizer=optimizer, weights=weights
        )

    def _passes(self, stage: int, chunk: int) -> Passes:
        dense, core = layers_of_chunk(self.run, stage, self.roles[chunk])
        loops = self.run.model.segments.loops
        parts: list[Passes] = []
        for layers, again, kept in (
            (dense, self.compute.layer, self.kept.layer),
            (core, self.compute.of_core(chunk), self.kept.of_core(chunk)),
        ):
            repeated = self.run.parallel.recomputed_layers(layers)
            parts += [_times(again, repeated), _times(kept, layers - repeated)]
        if 1 <= chunk <= loops_without_gradients(loops, self.run.loops.backprop_loops):
            parts = [Passes(_joined(parts).forward)]
        if stage == 0 and 0 < chunk <= loops + 1:
            parts.append(self.compute.boundary(chunk - 1))
        if stage == self.ring - 1 and chunk == len(self.roles) - 1:
            parts.append(_times(self.compute.head, self.run.model.losses_per_token))
        return Passes(_joined(parts).forward) if self.run.model.exit_gate_only else _joined(parts)

    def _afterwards(self, stage: int) -> tuple[float, float, float]:
        run, parallel = self.run, self.run.parallel
        parameters = trained_parameters(run.model, rank_parameters(run.model, parallel, self.rows, stage))
        tensor, experts = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
        stage_size = self.world_size // self.ring
        expert_stride = experts * parallel.expert_tensor_size
        shares = [
            (parameters.dense + parameters.float32, stage_size // tensor, tensor),
            (parameters.experts, stage_size // expert_stride, expert_stride),
        ]
        if parallel.use_torch_fsdp2:
            return self._fully_sharded(parameters.total / parallel.share_ranks(self.world_size))
        size = gradient_bytes(self.run)
        gradients = weights = updated = 0.0
        for count, ranks, stride in shares:
            if count == 0:
                continue
            sent = count * (ranks - 1) / ranks
            if run.slices_optimizer:
                gradients += self.links.collective(sent * size, ranks, stride)
            else:
                gradients += self.links.collective(2 * sent * size, ranks, stride, rounds=2)
            if parallel.use_distributed_optimizer:
                weights += self.links.collective(sent * self.compute.size, ranks, stride)
                updated += count / ranks
            else:
                updated += count
        low = self.compute.size if self.compute.size < FLOAT32 else 0
        saved = 2 * (MOMENTS - moment_bytes(run))  # read and written
        optimizer = (updated * (ADAM_TRAFFIC - saved + low) + parameters.total * size) / self.compute.bandwidth
        if run.training.optimizer == "muon":
            optimizer += self._orthogonalisation(stage, shares[0][1], shares[1][1])
        if parallel.overlap_grad_reduce:
            gradients = max(0.0, gradients - self._once(stage).backward.total)
        if parallel.overlap_param_gather:
            weights = max(0.0, weights - self._once(stage).forward.total)
        return gradients, optimizer, weights

    def _orthogonalisation(self, stage: int, replicas: int, expert_replicas: int) -> float:
        """Return the seconds of Muon's Newton-Schulz steps and gathers, less a moment that matrices do not have.

        With --use-distributed-optimizer replicas share the matrices evenly.
        """
        run, parallel = self.run, self.run.parallel
        gpu, medium = self.links.gpu, run.training.muon_fp32_matmul_prec == "medium"
        rate = (gpu.bf16_tflops if medium else gpu.fp32_tflops) * 1e12 * self.links.assumptions.matmul_efficiency
        seconds = 0.0
        for work, ranks, tensor in (
            (dense_work(run, stage), replicas, parallel.tensor_model_parallel_size),
            (expert_work(run, stage), expert_replicas, parallel.expert_tensor_size),
        ):
            sent = work.elements * FLOAT32 * (tensor - 1) / tensor
            here = work.flops / rate - work.elements / tensor * 2 * FLOAT32 / self.compute.bandwidth
            here += self.links.collective(sent, tensor, 1, rounds=work.matrices)
            seconds += here / (ranks if parallel.use_distributed_optimizer else 1)
        return seconds

    def _fully_sharded(self, updated: float) -> tuple[float, float, float]:
        """Return gradients, optimizer and weights as ``_afterwards``, as if nothing overlapped with computation."""
        traffic = step_traffic(self.run, self.rows, self.micro_batches)
        copies = self.run.parallel.num_distributed_optimizer_instances
        ranks = self.run.parallel.share_ranks(self.world_size)
        sent = (ranks - 1) / ranks
        gradients = self.links.collective(traffic.reduced * sent, ranks, 1, rounds=traffic.reductions)
        between = 2 * traffic.reduced / ranks * (copies - 1) / copies
        gradients += self.links.collective(between, copies, ranks, rounds=2 * traffic.reductions)
        weights = self.links.collective(traffic.gathered * sent, ranks, 1, rounds=traffic.gathers)
        return gradients, updated * (ADAM_TRAFFIC + FLOAT32) / self.compute.bandwidth, weights

    def _once(self, stage: int) -> Passes:
        """Return the time of one micro-batch through each unique layer of a rank, once."""
        layout = self.run.model.segments

        def held(layers: int) -> int:
            return len(share(range(layers), stage, self.ring))

        cores = held(layout.core) * (1 if layout.shared else layout.loops)
        dense = held(layout.prelude) + held(layout.coda)
        return _joined([_times(self.compute.layer, dense), _times(self.compute.core_layer, cores)])


def _joined(parts: list[Passes]) -> Passes:
    return Passes(
        sum((part.forward for part in parts), start=Time()), sum((part.backward for part in parts), start=Time())
    )


def _times(passes: Passes, count: int) -> Passes:
    return Passes(passes.forward * count, passes.backward * count)
