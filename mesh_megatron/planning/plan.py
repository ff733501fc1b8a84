"""Everything a run is going to hold and send, from its settings alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mesh_megatron.config.output import CheckpointConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.memory import RankMemory, layers_of_chunk, memory_of_ranks
from mesh_megatron.planning.parameters import active_parameters
from mesh_megatron.planning.schedule import order_of_work
from mesh_megatron.planning.summary import RunSummary, summary_of
from mesh_megatron.planning.timeline import bubble, replay
from mesh_megatron.planning.traffic import Traffic, traffic_of_step

RECOMPUTE = (None, "selective", "full")
"""The choices of ``--recompute-granularity``."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run on so many GPUs."""

    run: RunConfig
    summary: RunSummary
    active_parameters: int
    memory: list[RankMemory]
    """By place on the ring."""
    traffic: list[Traffic]

    bubble: float
    """Share of the ranks' time in which they wait for each other, messages taking none and a layer's backward pass
    twice its forward pass."""

    @property
    def fullest(self) -> RankMemory:
        return max(self.memory, key=lambda rank: rank.total)

    def fullest_with(self, recompute: str | None) -> RankMemory:
        """The fullest rank under another recompute choice."""
        parallel = replace(self.run.parallel, recompute_granularity=recompute)  # type: ignore[arg-type]
        run, ranks = replace(self.run, parallel=parallel), self.summary.ranks.world_size
        memory = memory_of_ranks(run, self.summary.vocabulary_rows, ranks, self.summary.micro_batches)
        return max(memory, key=lambda rank: rank.total)


def ring_bubble(run: RunConfig, micro_batches: int) -> float:
    """The schedule of a step replayed with one unit of time a layer forward and two backward."""
    ring, chunks = run.parallel.pipeline_model_parallel_size, run.model.segments.loops + 2
    if ring == 1:
        return 0.0
    work = [order_of_work(ring, stage, chunks, micro_batches) for stage in range(ring)]
    layers = [[sum(layers_of_chunk(run, stage, chunk)) for chunk in range(chunks)] for stage in range(ring)]
    return bubble(replay(work, layers))


def plan_run(run: RunConfig, world_size: int, gpus_per_node: int = 8) -> Plan:
    """``ValueError`` naming flag, value and mend where the run could not start so; no file is looked at."""
    run = replace(run, dry_run=True, checkpoint=CheckpointConfig())  # where it writes is not planned
    run.validate(world_size)
    vocabulary = run.model.padded_vocabulary(None)
    tensor = run.parallel.tensor_model_parallel_size
    if vocabulary % tensor:
        raise ValueError(
            f"--padded-vocab-size {vocabulary} does not divide by --tensor-model-parallel-size {tensor}: use "
            f"{-(-vocabulary // tensor) * tensor}"
        )
    summary = summary_of(run, vocabulary, world_size)
    return Plan(
        run=run,
        summary=summary,
        active_parameters=active_parameters(run.model, vocabulary),
        memory=memory_of_ranks(run, vocabulary, world_size, summary.micro_batches),
        traffic=traffic_of_step(run, vocabulary, world_size, summary.micro_batches, gpus_per_node),
        bubble=ring_bubble(run, summary.micro_batches),
    )
