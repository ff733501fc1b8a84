"""Settings of a complete run: all groups, and the checks that involve more than one group."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mesh_megatron.config.bounds import Count, check_bounds
from mesh_megatron.config.checkpoint import CheckpointConfig
from mesh_megatron.config.data import DataConfig, parse_split
from mesh_megatron.config.fp8 import Fp8Config
from mesh_megatron.config.logging import LoggingConfig
from mesh_megatron.config.loops import LoopsConfig, Shares
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.config.recurrence import scheme_spec
from mesh_megatron.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Pretrain a recursive (looped, weight-shared) transformer; start it with torchrun, on any number of ranks."""

    config: Path | None = None
    """YAML file with groups model, loops, parallel, data, training, fp8, checkpoint and logging; flags override it."""
    preset: str | None = None
    """Model of Table 1: pythia-160m, pythia-410m, pythia-1b or pythia-1.4b; file and flags override it."""
    router_preset: Literal["paper", "recommended"] | None = None
    """Form of mesh's routers: the paper's, which is the default, or the one that docs/study.md recommends; file and
    flags override it."""
    dry_run: bool = False
    """Print the summary and exit; needs no data and no torchrun."""
    world_size: Count | None = None
    """Number of ranks to assume with --dry-run; default the number started."""
    summary_json: Path | None = None
    """Also write the summary to this file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loops: LoopsConfig = field(default_factory=LoopsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def validate(self, world_size: int) -> None:
        """Raise ``ValueError`` naming the flag, its value and the fix; files are checked unless ``dry_run``."""
        check_bounds(self)
        self.model.validate()
        scheme_spec(self.model).validate()
        self.loops.validate(self.model)
        self.parallel.validate(self.model, builds=not self.dry_run)
        self.training.validate()
        self.fp8.validate(self.model, self.parallel, self.training)
        self.checkpoint.validate(writes=not self.dry_run)
        self.logging.validate()
        if self.dry_run:
            parse_split(self.data.split)
        else:
            self.data.validate()
        data_parallel = self.parallel.data_parallel_size(world_size)
        self.parallel.validate_expert_ranks(world_size)
        self.training.validate_batch(data_parallel)
        if self.parallel.grad_reduce_in_bf16 and not self.training.bf16:
            raise ValueError("--grad-reduce-in-bf16 needs --bf16: gradients of other weights keep float32; drop it")
        if self.parallel.overlap_param_gather and self.training.optimizer == "muon":
            raise ValueError(
                "--overlap-param-gather does not work with --optimizer muon, whose ranks broadcast complete parameters "
                "after an update: drop --overlap-param-gather"
            )
        if self.parallel.use_distributed_optimizer and self.training.optimizer == "sgd":
            raise ValueError(
                "--use-distributed-optimizer does not work with --optimizer sgd: Megatron-Core's takes AdamW only; "
                "drop one of the two"
            )
        engine = self.parallel.transformer_impl == "transformer_engine" or self.fp8.fp8_format is not None
        if engine and (name := self.model.needs_local_layers) is not None:
            raise ValueError(
                f"{name} does not work with Transformer Engine (--transformer-impl transformer_engine or "
                "--fp8-format), whose layers compute the same in every loop: drop one of the two"
            )
        if self.data.reset_attention_mask and self.parallel.context_parallel_size > 1:
            raise ValueError(
                f"--reset-attention-mask does not work with --context-parallel-size "
                f"{self.parallel.context_parallel_size}: its attention is causal only; drop one of the two"
            )
        positions = self.model.max_position_embeddings
        if positions is not None and positions < self.model.seq_length:
            raise ValueError(
                f"--max-position-embeddings {positions} is below --seq-length {self.model.seq_length}: an export would "
                "declare less than it was trained on; raise it or drop the flag"
            )
        self._validate_exits()
        self._validate_fully_sharded(world_size)
        backend = self.parallel.attention_backend
        if self.model.attention_dropout and backend not in ("auto", "local"):
            raise ValueError(
                f"--attention-dropout {self.model.attention_dropout} with --attention-backend {backend}: the masks of "
                "its kernels depend on the layout of ranks; use --attention-backend local, or --attention-dropout 0"
            )
        self._validate_ring(data_parallel)
        self._validate_length(data_parallel)
        missing = [rank for rank in self.logging.profile_ranks if rank >= world_size]
        if self.logging.profile and missing:
            raise ValueError(f"--profile-ranks {missing[0]}: ranks are 0 to {world_size - 1}")

    def _validate_exits(self) -> None:
        """Raise ``ValueError`` for what does not go with losses after every loop."""
        model, loops, parallel = self.model, self.loops, self.parallel
        if not model.losses_after_loops:
            return
        sampling, ring = f"--loops-sampling {loops.loops_sampling}", parallel.pipeline_model_parallel_size
        numbers, hidden = 2 * model.segments.loops, model.hidden_size  # of two bytes
        one_number = loops.sampled and (model.exit_gate_only or model.loop_loss_weights)
        others = (
            (
                ring > 1 and model.exit_gate and numbers > hidden,
                f"--pipeline-model-parallel-size {ring}",
                f"a state of --hidden-size {hidden} has no room for the gate's {numbers} numbers of a token",
            ),
            (one_number, sampling, "it is made for K loops in every step"),
            (loops.backprop_loops, f"--backprop-loops {loops.backprop_loops}", "every loop has a loss to learn from"),
            (
                model.exit_gate_only and self.fp8.fp8_format,
                f"--fp8-format {self.fp8.fp8_format}",
                "untested with frozen weights",
            ),
            (model.exit_gate_only and parallel.use_torch_fsdp2, "--use-torch-fsdp2", "untested with frozen weights"),
            (
                model.exit_gate and model.num_experts,
                f"--num-experts {model.num_experts}",
                "tokens leave early in exports, which a core of experts has not",
            ),
            (model.exit_gate_only and self.training.optimizer == "muon", "--optimizer muon", "the gate is no matrix"),
        )
        for other, name, reason in others:
            if other:
                raise ValueError(f"{model.losses_flag} does not work with {name}: {reason}; drop one of the two")

    def _validate_fully_sharded(self, world_size: int) -> None:
        """Raise ``ValueError`` for what has not been made to work with --use-torch-fsdp2."""
        parallel, training = self.parallel, self.training
        copies = parallel.num_distributed_optimizer_instances
        if not parallel.use_torch_fsdp2:
            if copies > 1:
                raise ValueError(
                    f"--num-distributed-optimizer-instances {copies} needs --use-torch-fsdp2: a distributed optimizer "
                    "is split over all data-parallel ranks; add it or drop the flag"
                )
            return
        if world_size % copies:
            raise ValueError(
                f"--num-distributed-optimizer-instances {copies} does not divide {world_size} ranks: use a divisor, "
                "such as the number of nodes"
            )
        tensor, ring = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        interval = training.check_weight_hash_across_dp_replicas_interval
        others = (
            (tensor > 1, f"--tensor-model-parallel-size {tensor}", "parameters are cut in one way"),
            (ring > 1, f"--pipeline-model-parallel-size {ring}", "parameters are cut in one way"),
            (self.model.num_experts, f"--num-experts {self.model.num_experts}", "experts have other replicas"),
            (self.fp8.fp8_format, f"--fp8-format {self.fp8.fp8_format}", "weights are gathered in bfloat16"),
            (training.fp16, "--fp16", "ranks do not tell each other of overflows"),
            (training.optimizer != "adam", f"--optimizer {training.optimizer}", "only AdamW takes shares of rows"),
            (parallel.use_distributed_optimizer, "--use-distributed-optimizer", "optimizer state is divided already"),
            (parallel.overlap_grad_reduce, "--overlap-grad-reduce", "gradients are reduced while others are computed"),
            (parallel.grad_reduce_in_bf16, "--grad-reduce-in-bf16", "gradients are reduced in float32"),
            (parallel.transformer_impl == "transformer_engine", "--transformer-impl transformer_engine", "untested"),
            (
                parallel.recompute_granularity == "full"
                and parallel.recompute_method == "uniform"
                and parallel.recompute_num_layers > 1,
                f"--recompute-num-layers {parallel.recompute_num_layers}",
                "layers are gathered, and recomputed, one by one",
            ),
            (
                self.loops.backprop_loops,
                f"--backprop-loops {self.loops.backprop_loops}",
                "the core's gradients are reduced in loop 1",
            ),
            (interval, f"--check-weight-hash-across-dp-replicas-interval {interval}", "there are no replicas"),
        )
        for given, flag, reason in others:
            if given:
                raise ValueError(f"--use-torch-fsdp2 does not work with {flag}: {reason}; drop one of the two")

    def _validate_length(self, data_parallel: int) -> None:
        """Raise ``ValueError`` if the training length is missing or shorter than one step."""
        training = self.training
        if not training.has_length and not training.eval_only and not self.dry_run:
            raise ValueError("how long to train is not set: give --train-iters, --train-samples or --train-tokens")
        if not training.has_length:
            return
        if training.eval_only or training.total_iters(data_parallel, self.model.seq_length) > 0:
            return
        batch = training.ramped_batch_size(0, training.batch_size(data_parallel), self.model.seq_length)
        given, value, unit = "--train-samples", training.train_samples, batch
        if training.train_tokens is not None:
            given, value, unit = "--train-tokens", training.train_tokens, batch * self.model.seq_length
        raise ValueError(f"{given} {value} is less than one step, which takes {unit}: raise it or lower the batch")

    def _validate_ring(self, data_parallel: int) -> None:
        """Check the batch against the interleaved schedule, which takes micro-batches in groups of PP."""
        ranks = self.parallel.pipeline_model_parallel_size
        if ranks == 1:
            return
        if not self.parallel.overlap_p2p and ranks == 2:
            raise ValueError("--no-overlap-p2p at --pipeline-model-parallel-size 2 gives wrong results: drop the flag")
        unit = self.training.micro_batch_size * data_parallel
        sizes = {"--global-batch-size": self.training.batch_size(data_parallel), **self.training.smaller_batches}
        for flag, size in sizes.items():
            if (size // unit) % ranks:
                below, above = size // (unit * ranks) * unit * ranks, -(-size // (unit * ranks)) * unit * ranks
                raise ValueError(
                    f"{flag} {size} gives {size // unit} micro-batches; --pipeline-model-parallel-size {ranks} needs a "
                    f"multiple of {ranks}: use {f'{below} or ' if below else ''}{above}"
                )

    def loops_of_step(self, iteration: int) -> int:
        """Return the number of loops of step ``iteration`` (from 1): the same on every rank and after a restart."""
        return self.loops.of_step(self.model, self.training.seed, iteration)

    def loop_shares(self, world_size: int) -> Shares:
        """Return the expected share of the run's steps by number of loops."""
        return self.loops.shares(self.model, self.iterations(world_size))

    def at_loops(self, loops: int) -> RunConfig:
        """Return the run whose core always runs ``loops`` times; itself if it does."""
        if not self.loops.sampled:
            return self
        return replace(
            self, model=self.model.at_loops(loops), loops=LoopsConfig(backprop_loops=self.loops.backprop_loops)
        )

    @property
    def slices_optimizer(self) -> bool:
        """True if data-parallel ranks share optimizer state as slices of buffers; with Muon they share parameters."""
        return self.parallel.use_distributed_optimizer and self.training.optimizer != "muon"

    def iterations(self, world_size: int) -> int:
        """Return the number of optimizer steps in the run."""
        data_parallel = self.parallel.data_parallel_size(world_size)
        return self.training.total_iters(data_parallel, self.model.seq_length)
