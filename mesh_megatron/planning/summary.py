"""Summary of a run in numbers, which the trainer and ``--dry-run`` print before training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.config.recurrence import scheme_spec
from mesh_megatron.config.ring import layers_by_rank, ring_chunks
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning import flops
from mesh_megatron.planning.flops import TrainingFlops, mean_flops_per_token
from mesh_megatron.planning.parameters import ParameterCount, count_parameters


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """Parallel sizes: world = tensor x context x data x pipeline; expert divides tensor x context x data."""

    world_size: int
    tensor: int
    context: int
    expert: int
    data: int
    pipeline: int


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Numbers of a run; sizes in parameters, tokens and operations."""

    recurrence: str
    layout: str
    """Layout in the paper's notation."""
    loops: int
    """Number of times that the core runs (0: no core)."""
    mean_loops: float
    """Mean of the number of loops over the steps of training (``--loops-sampling``)."""
    shared_core: bool
    memory_slots: int | None
    num_experts: int | None
    unique_layers: int
    computed_layers: int
    cached_layers: int
    """Entries of a key-value cache: computed layers, fewer where loops share keys and values."""
    hidden_size: int
    seq_length: int
    vocabulary_rows: int
    parameters: ParameterCount
    flops_per_token: TrainingFlops
    """Mean over the steps of training."""
    flops_formula: str
    ranks: RankLayout
    layers_by_rank: list[int]
    """Number of layers that each rank of the ring computes per micro-batch, counting all loops."""
    chunks: list[str]
    """Segments that a micro-batch passes in training, in order; on a ring one chunk of every rank each."""
    losses_per_token: int
    """Losses of a token in training: more than one with losses after every loop."""
    micro_batch_size: int
    global_batch_size: int
    micro_batches: int
    """Micro-batches per step on one data-parallel rank."""
    tokens_per_step: int
    """Tokens per step at the full global batch, which a ramp-up reaches only at its end."""
    train_iters: int
    """0 if the length is not set."""
    train_samples: int
    """Sequences that these steps consume."""

    @property
    def total_tokens(self) -> int:
        return self.train_samples * self.seq_length

    @property
    def total_flops(self) -> int:
        return self.total_tokens * self.flops_per_token.total

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested values for JSON: the fields, and the totals computed from them."""
        record = dataclasses.asdict(self)
        record["parameters"] |= {"total": self.parameters.total, "non_embedding": self.parameters.non_embedding}
        for layer in ("layer", "core_layer"):
            record["parameters"][layer]["total"] = getattr(self.parameters, layer).total
        record["flops_per_token"]["total"] = self.flops_per_token.total
        return record | {"total_tokens": self.total_tokens, "total_flops": self.total_flops}

    def to_text(self) -> str:
        """Return a table to print, one fact per row."""
        rows = [
            ("model", self._model_words()),
            ("layers", f"{self.unique_layers} unique, {self.computed_layers} computed{self._cache_words()}"),
            *([("loops", f"{self.mean_loops:.2f} on average")] if self.mean_loops != self.loops else []),
            ("parameters", _exact_and_short(self.parameters.total)),
            ("  embedding", f"{self.parameters.embedding:,} ({self.vocabulary_rows:,} rows)"),
            ("  non-embedding", f"{self.parameters.non_embedding:,}"),
            ("  state passing", f"{self.parameters.recurrence:,}"),
            ("ranks", self._rank_words()),
            *self._imbalance_rows(),
            ("batch", self._batch_words()),
            ("tokens per step", f"{self.tokens_per_step:,}"),
            ("steps", self._length_words()),
            ("FLOPs per token", f"{_short(self.flops_per_token.total)} ({self.flops_formula})"),
            ("  state passing", f"{self.flops_per_token.state_passing / self.flops_per_token.total:.3%}"),
            *([("FLOPs of the run", f"{self.total_flops:.3g}")] if self.train_iters else []),
        ]
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in rows)

    def _model_words(self) -> str:
        words = f"{self.recurrence}, layout {self.layout}, hidden size {self.hidden_size}, sequence {self.seq_length}"
        words += f", {self.memory_slots} memory slots" if self.memory_slots is not None else ""
        return words + (f", {self.num_experts} experts in the core" if self.num_experts is not None else "")

    def _cache_words(self) -> str:
        if self.cached_layers == self.computed_layers:
            return ""
        return f"; {self.cached_layers} with keys and values of their own, which later loops share"

    def _rank_words(self) -> str:
        ranks = self.ranks
        words = (
            f"{ranks.world_size} = tensor {ranks.tensor} x context {ranks.context} x data {ranks.data} "
            f"x pipeline {ranks.pipeline}; expert {ranks.expert}"
        )
        if ranks.pipeline == 1:
            return words
        return f"{words}; ring of {ranks.pipeline} ranks, {len(self.chunks)} chunks each: {', '.join(self.chunks)}"

    def _length_words(self) -> str:
        if not self.train_iters:
            return "not set (--train-iters, --train-samples or --train-tokens)"
        return f"{self.train_iters:,} ({_short(self.total_tokens)} tokens)"

    def _imbalance_rows(self) -> list[tuple[str, str]]:
        """Return a row for each reason why some ranks of the ring compute more than others, which then wait."""
        layers, rows = self.layers_by_rank, []
        if self.losses_per_token > 1 and len(layers) > 1:
            rows = [("  losses", f"the last rank computes a token's logits and loss {self.losses_per_token} times")]
        if len(set(layers)) == 1:
            return rows
        busiest = max(layers) * len(layers) / sum(layers)
        return [
            *rows,
            (
                "  imbalance",
                f"layers by rank {', '.join(map(str, layers))}: the busiest has {busiest:.2f} times the "
                f"mean; even where prelude, core and coda each divide by {len(layers)}",
            ),
        ]

    def _batch_words(self) -> str:
        return (
            f"{self.global_batch_size} sequences = micro-batch size {self.micro_batch_size} x "
            f"{self.micro_batches} micro-batches x {self.ranks.data} data-parallel"
        )


def summary_of(run: RunConfig, vocabulary_rows: int, world_size: int) -> RunSummary:
    """Summarize ``run`` on ``world_size`` ranks; raise ``ValueError`` where ranks or batch do not divide."""
    model, training = run.model, run.training
    ranks, shares = _rank_layout(run.parallel, world_size), run.loop_shares(world_size)
    training.validate_batch(ranks.data)
    layout, batch, iterations = model.segments, training.batch_size(ranks.data), run.iterations(world_size)
    return RunSummary(
        recurrence=model.recurrence,
        layout=str(layout),
        loops=layout.loops,
        mean_loops=sum(loops * share for loops, share in shares.items()),
        shared_core=layout.shared,
        memory_slots=scheme_spec(model).settings().get("num_memory_slots"),
        num_experts=model.num_experts,
        unique_layers=layout.unique_layers,
        computed_layers=layout.computed_layers,
        cached_layers=model.cached_layers,
        hidden_size=model.hidden_size,
        seq_length=model.seq_length,
        vocabulary_rows=vocabulary_rows,
        parameters=count_parameters(model, vocabulary_rows),
        flops_per_token=mean_flops_per_token(model, vocabulary_rows, shares, run.loops.backprop_loops),
        flops_formula=flops.FORMULA,
        ranks=ranks,
        layers_by_rank=layers_by_rank(model, ranks.pipeline),
        chunks=[role.segment for role in ring_chunks(model)],
        losses_per_token=model.losses_per_token,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=batch,
        micro_batches=batch // (training.micro_batch_size * ranks.data),
        tokens_per_step=batch * model.seq_length,
        train_iters=iterations,
        train_samples=training.samples_after(iterations, batch, model.seq_length),
    )


def _rank_layout(parallel: ParallelConfig, world_size: int) -> RankLayout:
    data = parallel.data_parallel_size(world_size)
    parallel.validate_expert_ranks(world_size)
    return RankLayout(
        world_size=world_size,
        tensor=parallel.tensor_model_parallel_size,
        context=parallel.context_parallel_size,
        expert=parallel.expert_model_parallel_size,
        data=data,
        pipeline=parallel.pipeline_model_parallel_size,
    )


def _exact_and_short(count: int) -> str:
    return f"{count:,} ({_short(count)})"


def _short(count: int) -> str:
    """Format with three digits and a unit: 1.42B."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= 0.9995 * size:  # three digits of what is just below would be 1e+03 of the smaller unit
            return f"{count / size:.3g}{unit}"
    return str(count)
