"""Plan of a run, from its settings alone: parameters, memory and traffic per rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mesh_megatron.config.checkpoint import CheckpointConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.parameters import active_parameters
from mesh_megatron.planning.rank_memory import RankMemory, memory_of_ranks
from mesh_megatron.planning.summary import RunSummary, summary_of
from mesh_megatron.planning.traffic import Traffic, traffic_of_step

RECOMPUTE = (None, "selective", "full")
"""The choices of ``--recompute-granularity``."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predicted needs of one run on a given number of GPUs."""

    run: RunConfig
    summary: RunSummary
    active_parameters: int
    memory: list[RankMemory]
    """Memory by pipeline stage."""
    traffic: list[Traffic]

    @property
    def fullest(self) -> RankMemory:
        """The rank that needs the most memory."""
        return max(self.memory, key=lambda rank: rank.total)

    def fullest_with(self, recompute: str | None) -> RankMemory:
        """Return the rank that needs the most memory with another --recompute-granularity."""
        parallel = replace(self.run.parallel, recompute_granularity=recompute)  # type: ignore[arg-type]
        run, ranks = replace(self.run, parallel=parallel), self.summary.ranks.world_size
        memory = memory_of_ranks(run, self.summary.vocabulary_rows, ranks, self.summary.micro_batches)
        return max(memory, key=lambda rank: rank.total)


def checked_vocabulary(run: RunConfig, world_size: int) -> int:
    """Return the number of embedding rows; raise ``ValueError`` naming flag, value and fix if the run is not valid.

    Files and checkpoint settings are not checked.
    """
    replace(run, dry_run=True, checkpoint=CheckpointConfig()).validate(world_size)
    vocabulary = run.model.padded_vocabulary(None)
    run.parallel.validate_vocabulary(vocabulary)
    return vocabulary


def plan_run(run: RunConfig, world_size: int, gpus_per_node: int = 8) -> Plan:
    """Plan ``run`` on ``world_size`` GPUs; raise ``ValueError`` as ``checked_vocabulary`` does."""
    vocabulary = checked_vocabulary(run, world_size)
    summary = summary_of(run, vocabulary, world_size)
    return Plan(
        run=run,
        summary=summary,
        active_parameters=active_parameters(run.model, vocabulary),
        memory=memory_of_ranks(run, vocabulary, world_size, summary.micro_batches),
        traffic=traffic_of_step(run, vocabulary, world_size, summary.micro_batches, gpus_per_node),
    )
