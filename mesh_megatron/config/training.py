"""Training settings: length, batch, optimizer, learning-rate schedule, precision, evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from mesh_megatron.config.bounds import Bounds, Count, check_bounds, flag
from mesh_megatron.config.muon import MuonConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(MuonConfig):
    """Training: length, batch, optimizer, learning rate, precision, evaluation."""

    train_iters: Count | None = None
    """Optimizer steps to train for; or give --train-samples or --train-tokens."""
    train_samples: Count | None = None
    """Sequences to train for."""
    train_tokens: Count | None = None
    """Tokens to train for."""
    micro_batch_size: Count = 1
    """Sequences per forward pass on one data-parallel rank."""
    global_batch_size: Count | None = None
    """Sequences per optimizer step, over all ranks; default one micro-batch per data-parallel rank."""
    rampup_batch_size: tuple[Count, ...] = ()
    """Grow the global batch: START INCREMENT SAMPLES, from START by INCREMENT up to --global-batch-size over
    SAMPLES sequences."""
    step_batch_size_schedule: tuple[str, ...] = ()
    """Grow the global batch in steps, TOKENS:SEQUENCES for each: "0:16 2.4B:320 12B:1536" is 16 sequences at first, 320
    from 2.4 billion tokens on. K, M, B and T multiply by thousands."""
    seed: Annotated[int, Bounds(least=0, most=2**32 - 1)] = 1234
    """Seed of initial weights and data order."""
    deterministic_mode: bool = False
    """On a GPU, use only algorithms that add in a fixed order: repeated runs are bitwise equal, but slower. On a CPU
    they always are."""

    bf16: bool = False
    """Weights and activations in bfloat16; main weights and gradient accumulation stay float32."""
    fp16: bool = False
    """Weights and activations in float16, otherwise as --bf16, with loss scaling."""
    disable_bf16_reduced_precision_matmul: bool = False
    """With --bf16 on a GPU, add the parts of a matrix product that is computed in parts in float32; slower."""
    loss_scale: Annotated[float, Bounds(above=0)] | None = None
    """Constant loss scale for --fp16; default a dynamic one."""
    initial_loss_scale: Annotated[float, Bounds(above=0)] = 2.0**16
    """Initial dynamic loss scale."""
    min_loss_scale: Annotated[float, Bounds(above=0)] = 2.0**-14
    """Smallest dynamic loss scale (losses are summed over tokens, so it may fall below 1)."""
    loss_scale_window: Count = 1000
    """Steps without overflow before the dynamic loss scale doubles."""

    lr: Annotated[float, Bounds(above=0)] = 6e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Bounds(least=0)] | None = None
    """Final learning rate; default 10% of the peak."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay; WSD is warmup, stable, decay."""
    lr_decay_iters: Count | None = None
    """Steps until the learning rate reaches its final value; default all of training."""
    lr_decay_samples: Count | None = None
    """Sequences until then, instead of steps."""
    lr_warmup_iters: Annotated[int, Bounds(least=0)] | None = None
    """Steps of linear warmup; or --lr-warmup-samples or --lr-warmup-fraction."""
    lr_warmup_samples: Annotated[int, Bounds(least=0)] | None = None
    """Sequences of linear warmup."""
    lr_warmup_fraction: Annotated[float, Bounds(least=0, below=1)] | None = None
    """Share of the decay steps to warm up over; 0.01 when no warmup is given."""
    lr_warmup_init: Annotated[float, Bounds(least=0)] = 0.0
    """Learning rate at which the warmup begins; rates of their own begin at the same share of their peaks."""
    lr_wsd_decay_iters: Count | None = None
    """Steps of the final decay of WSD; default 10% of the training length, in the unit of that length."""
    lr_wsd_decay_samples: Count | None = None
    """Sequences of that decay, instead of steps."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "minus_sqrt"
    """Shape of the final decay of WSD."""
    router_lr_mult: Annotated[float, Bounds(least=0, zero="routers stay as they are")] = 1.0
    """Learning rate of the routers of mesh and dynamic, as a multiple of all others'."""
    router_wd_mult: Annotated[float, Bounds(least=0, zero="no weight decay for routers")] = 1.0
    """Weight decay of the routers' weights, as a multiple of all others'; their biases and scales have none."""
    decoupled_lr: Annotated[float, Bounds(above=0)] | None = None
    """Peak learning rate of the embedding and the output layer; default --lr."""
    decoupled_min_lr: Annotated[float, Bounds(least=0)] | None = None
    """Final learning rate of the embedding and the output layer; default as far below the peak as all others'."""
    weight_decay: Annotated[float, Bounds(least=0)] = 0.01
    """Decoupled weight decay; biases and norms have none."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """Growth of weight decay over training, from --start-weight-decay to --end-weight-decay."""
    start_weight_decay: Annotated[float, Bounds(least=0)] | None = None
    """First weight decay, where it grows."""
    end_weight_decay: Annotated[float, Bounds(least=0)] | None = None
    """Last weight decay, where it grows."""
    adam_beta1: Annotated[float, Bounds(least=0, below=1)] = 0.9
    """First moment's decay."""
    adam_beta2: Annotated[float, Bounds(least=0, below=1)] = 0.95
    """Second moment's decay."""
    adam_eps: Annotated[float, Bounds(above=0)] = 1e-8
    """Added to the root of the second moment."""
    clip_grad: Annotated[float, Bounds(least=0, zero="no clipping")] = 1.0
    """Largest gradient norm; 0 for no clipping."""

    eval_interval: Count = 1000
    """Steps between evaluations."""
    eval_iters: Annotated[int, Bounds(least=0, zero="no evaluation")] = 100
    """Global batches in one evaluation; 0 for none."""
    eval_only: bool = False
    """Evaluate on validation and test data and stop."""

    check_weight_hash_across_dp_replicas_interval: Count | None = None
    """Steps between comparisons of weights across data-parallel ranks, the first after the first step; a difference
    stops the run. Default: never."""
    iterations_to_skip: tuple[Count, ...] = ()
    """Iterations whose samples are skipped: counted as consumed, but not trained on."""
    max_bad_steps: Annotated[int, Bounds(least=0, zero="never stop")] = 10
    """Stop, without a checkpoint, after this many consecutive steps whose loss or gradient was not finite or that were
    skipped for a loss spike; 0 never."""
    loss_spike_factor: Annotated[float, Bounds(above=1)] | None = None
    """Call a loss a spike if it exceeds this times the median of the last --loss-spike-window losses; default never."""
    loss_spike_window: Count = 128
    """Number of losses in that median, taken from steps that updated weights, with drawn loops from those with as many;
    until there are as many, no loss is a spike."""
    skip_loss_spikes: bool = False
    """Skip the weight update in a step whose loss is a spike; default: only report the spike."""

    rerun_mode: Literal["disabled", "validate_results"] = "disabled"
    """Repeat a step whose loss is not finite, to distinguish a hardware error from bad data."""
    error_injection_rate: Annotated[int, Bounds(least=0, zero="never")] = 0
    """With --rerun-mode validate_results, simulate a wrong loss once in about this many validations; 0 never."""
    error_injection_type: Literal["correct_result", "transient_error", "persistent_error"] = "transient_error"
    """Kind of simulated error."""

    exit_interval: Count | None = None
    """Save a checkpoint and stop when the iteration is a multiple of this."""
    exit_duration_in_mins: Annotated[float, Bounds(above=0)] | None = None
    """Save a checkpoint and stop after this many minutes."""
    manual_gc: bool = False
    """Do not leave garbage collection to Python: without --manual-gc-interval there is none during training."""
    manual_gc_interval: Annotated[int, Bounds(least=0, zero="leave it to Python")] = 0
    """Steps between garbage collections, which then happen on all ranks at once and never in between; 0 leaves them to
    Python, or with --manual-gc out."""

    @property
    def has_length(self) -> bool:
        """True if the settings say how long to train."""
        return (self.train_iters, self.train_samples, self.train_tokens) != (None, None, None)

    @property
    def precision(self) -> str:
        """``bf16``, ``fp16`` or ``fp32``."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    def batch_size(self, data_parallel_size: int) -> int:
        """Return the global batch size in sequences, with the default."""
        if self.global_batch_size is not None:
            return self.global_batch_size
        if self.step_batch_size_schedule:
            return self.batch_steps[-1][1]
        return self.micro_batch_size * data_parallel_size

    def total_iters(
        self, data_parallel_size: int, seq_length: int, iteration: int = 0, consumed: int = 0, tokens: int | None = None
    ) -> int:
        """Return the total number of optimizer steps, from iterations, samples or tokens.

        ``iteration`` steps have been taken so far, which consumed ``consumed`` sequences in batches of any size, with
        ``tokens`` tokens (None: ``seq_length`` per sequence).
        """
        if self.train_iters is not None:
            return self.train_iters
        batch = self.batch_size(data_parallel_size)
        if self.train_samples is not None:
            left = self.train_samples - consumed
        else:
            left = ((self.train_tokens or 0) - (consumed * seq_length if tokens is None else tokens)) // seq_length
        while (size := self.ramped_batch_size(consumed, batch, seq_length)) < batch and size <= left:
            iteration, consumed, left = iteration + 1, consumed + size, left - size
        return iteration + max(left, 0) // batch

    def asked_samples(self, batch: int, seq_length: int) -> int:
        """Return the number of sequences requested; a last incomplete batch of them is not trained on."""
        if self.train_iters is not None:
            return self.samples_after(self.train_iters, batch, seq_length)
        return self.train_samples if self.train_samples is not None else (self.train_tokens or 0) // seq_length

    @property
    def batch_steps(self) -> list[tuple[int, int]]:
        """Tokens and batch size of each step of the schedule; ``ValueError`` for an entry that is neither."""
        entries = " ".join(self.step_batch_size_schedule).replace(",", " ").split()
        return [_batch_step(entry) for entry in entries]

    @property
    def smaller_batches(self) -> dict[str, int]:
        """The settings that give batch sizes below --global-batch-size, or their steps, and these sizes."""
        if self.rampup_batch_size:
            start, increment, _ = self.rampup_batch_size
            return {"--rampup-batch-size START": start, "--rampup-batch-size INCREMENT": increment}
        return {f"--step-batch-size-schedule {tokens}:SEQUENCES": size for tokens, size in self.batch_steps}

    def ramped_batch_size(self, consumed_samples: int, batch: int, seq_length: int) -> int:
        """Return the global batch size after ``consumed_samples``, as Megatron-Core's calculators do."""
        if self.step_batch_size_schedule:
            reached = [size for tokens, size in self.batch_steps if consumed_samples >= tokens // seq_length]
            return reached[-1]
        if not self.rampup_batch_size:
            return batch
        start, increment, ramp_samples = self.rampup_batch_size
        steps = max((batch - start) // increment, 1)
        if consumed_samples > ramp_samples:
            return batch
        return min(start + int(consumed_samples / (ramp_samples / steps)) * increment, batch)

    def samples_after(self, iterations: int, batch: int, seq_length: int, consumed: int = 0) -> int:
        """Return the number of sequences consumed after ``iterations`` more steps, given ``consumed`` before them."""
        while iterations > 0 and (size := self.ramped_batch_size(consumed, batch, seq_length)) < batch:
            iterations, consumed = iterations - 1, consumed + size
        return consumed + max(iterations, 0) * batch

    def validate(self) -> None:
        """Raise ``ValueError`` naming the flag, its value and the fix."""
        check_bounds(self)
        lengths = ("train_iters", "train_samples", "train_tokens")
        given = [flag(name) for name in lengths if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: give one")
        self._validate_anomalies()
        if self.bf16 and self.fp16:
            raise ValueError("--bf16 and --fp16 contradict each other: give one")
        if self.fp16 and self.loss_scale is None and self.initial_loss_scale < self.min_loss_scale:
            raise ValueError(
                f"--initial-loss-scale {self.initial_loss_scale:g} is below --min-loss-scale {self.min_loss_scale:g}: "
                "raise the first or lower the second"
            )
        self._validate_rates()
        if self.rampup_batch_size:
            self._validate_rampup()
        if self.step_batch_size_schedule:
            self._validate_batch_steps()

    def _validate_rates(self) -> None:
        """Check learning rates, their schedule and weight decay."""
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"--min-lr {self.min_lr}: must be at most --lr {self.lr}")
        if self.lr_warmup_init > self.lr:
            raise ValueError(f"--lr-warmup-init {self.lr_warmup_init}: must be at most --lr {self.lr}")
        if self.decoupled_min_lr is not None and self.decoupled_lr is None:
            raise ValueError(
                f"--decoupled-min-lr {self.decoupled_min_lr} needs --decoupled-lr: add it, or use --min-lr for all"
            )
        if self.decoupled_min_lr is not None and self.decoupled_min_lr > (self.decoupled_lr or 0):
            raise ValueError(
                f"--decoupled-min-lr {self.decoupled_min_lr}: must be at most --decoupled-lr {self.decoupled_lr}"
            )
        if self.muon_scalar_lr is not None and self.optimizer != "muon":
            raise ValueError(f"--muon-scalar-lr {self.muon_scalar_lr} needs --optimizer muon: add it or drop this")
        for first, second in (("lr_decay_iters", "lr_decay_samples"), ("lr_wsd_decay_iters", "lr_wsd_decay_samples")):
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise ValueError(f"{flag(first)} and {flag(second)} contradict each other: give one")
        self._validate_weight_decay()
        warmups = ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction")
        given = [flag(name) for name in warmups if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: give one")
        self._validate_warmup("iters", "samples")
        self._validate_warmup("samples", "iters")

    def _validate_warmup(self, unit: str, other: str) -> None:
        """Check a warmup against the decay where both are in ``unit``; ``build_schedule`` checks all others."""
        if getattr(self, f"lr_decay_{other}") is not None:
            return
        warmup, name = getattr(self, f"lr_warmup_{unit}"), f"lr_decay_{unit}"
        name = f"train_{unit}" if getattr(self, name) is None else name
        end = getattr(self, name)
        if warmup and end is not None and warmup >= end:
            raise ValueError(f"--lr-warmup-{unit} {warmup}: must be below {flag(name)} {end}, where the decay ends")

    def _validate_weight_decay(self) -> None:
        start, end, style = self.start_weight_decay, self.end_weight_decay, self.weight_decay_incr_style
        if style == "constant":
            if (start, end) != (None, None):
                raise ValueError(
                    "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear or cosine; a "
                    "constant one is --weight-decay"
                )
        elif start is None or end is None or end < start:
            raise ValueError(
                f"--weight-decay-incr-style {style} needs --start-weight-decay and an --end-weight-decay that is not "
                f"below it; found {start} and {end}"
            )

    def _validate_anomalies(self) -> None:
        if self.error_injection_rate and self.rerun_mode != "validate_results":
            raise ValueError("--error-injection-rate needs --rerun-mode validate_results, which it tests")
        if self.skip_loss_spikes and self.loss_spike_factor is None:
            raise ValueError("--skip-loss-spikes needs --loss-spike-factor, which says what a spike is")

    def _validate_rampup(self) -> None:
        shown = " ".join(map(str, self.rampup_batch_size))
        if len(self.rampup_batch_size) != 3:
            raise ValueError(f"--rampup-batch-size {shown}: give three numbers, START INCREMENT SAMPLES")
        if self.global_batch_size is None:
            raise ValueError("--rampup-batch-size needs --global-batch-size, the batch to grow to")
        start, increment, _ = self.rampup_batch_size
        if start > self.global_batch_size or (self.global_batch_size - start) % increment:
            raise ValueError(
                f"--rampup-batch-size {shown}: from {start} in steps of {increment} does not reach --global-batch-size "
                f"{self.global_batch_size} exactly"
            )

    def _validate_batch_steps(self) -> None:
        steps, shown = self.batch_steps, " ".join(self.step_batch_size_schedule)
        if self.rampup_batch_size:
            raise ValueError("--step-batch-size-schedule and --rampup-batch-size contradict each other: give one")
        grows = all(a < c and b < d for (a, b), (c, d) in pairwise(steps))
        if not steps or steps[0][0] != 0 or steps[0][1] < 1 or not grows:
            raise ValueError(
                f"--step-batch-size-schedule {shown}: begin with 0:SEQUENCES; tokens and sequences must grow "
                "from entry to entry"
            )
        if self.global_batch_size not in (None, steps[-1][1]):
            raise ValueError(
                f"--global-batch-size {self.global_batch_size} is not the last batch of --step-batch-size-schedule "
                f"{shown}: drop it"
            )

    def validate_batch(self, data_parallel_size: int) -> None:
        """Check the batch against the number of data-parallel ranks; raise ``ValueError`` as ``validate`` does."""
        unit = self.micro_batch_size * data_parallel_size
        sizes = {"--global-batch-size": self.batch_size(data_parallel_size), **self.smaller_batches}
        for name, size in sizes.items():
            if size % unit:
                below, above = size // unit * unit, -(-size // unit) * unit
                raise ValueError(
                    f"{name} {size} does not divide by --micro-batch-size {self.micro_batch_size} x "
                    f"{data_parallel_size} data-parallel ranks: use {f'{below} or ' if below else ''}{above}"
                )


def _batch_step(entry: str) -> tuple[int, int]:
    """Read TOKENS:SEQUENCES, numbers that may end in K, M, B or T."""
    numbers = re.fullmatch(r"([\d.]+)([KMBT]?):([\d.]+)([KMBT]?)", entry.upper())
    try:
        if numbers is None:
            raise ValueError
        tokens, size = (int(float(numbers[at]) * 1000 ** " KMBT".index(numbers[at + 1] or " ")) for at in (1, 3))
    except (ValueError, OverflowError):
        raise ValueError(
            f"--step-batch-size-schedule {entry}: must be TOKENS:SEQUENCES, such as 0:16 or 2.4B:320"
        ) from None
    return tokens, size
