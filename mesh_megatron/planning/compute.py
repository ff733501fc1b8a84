"""Predicted time of one micro-batch on one rank: layers, boundaries between loops, the head. Nothing is measured.

A layer's matrix products are bound either by their operations, at an assumed share of the peak, or by reading their
weights, whichever takes longer. Attention's backward pass takes 2.5 times its forward pass, because it recomputes the
scores (FlashAttention-2, arXiv 2307.08691). Everything else is bound by memory bandwidth: the activations that a layer
keeps are written and read once in the forward pass and twice in the backward pass, which also adds to gradients in
float32. Communication inside a layer is not overlapped.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

from mesh_megatron.config.recurrence import FLOAT32, scheme_spec
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.activations import activation_sizes, value_bytes
from mesh_megatron.planning.flops import layer_macs
from mesh_megatron.planning.hardware import Gpu, Links
from mesh_megatron.planning.low_rank import low_rank_collectives
from mesh_megatron.planning.rank_memory import keeping_all
from mesh_megatron.planning.rank_parameters import layer_parameters_of_rank
from mesh_megatron.planning.traffic import Collectives, expert_bytes, hop_bytes, layer_collectives

ATTENTION_BACKWARD = 2.5
DROPOUT_BYTES = 40 * FLOAT32
"""Read and written per value that dropout considers, by plain torch: mostly the steps of the hash."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of one rank, by kind of work."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    """Operations bound by memory bandwidth."""
    messages: float = 0.0
    """Collectives inside layers, not overlapped."""
    launches: float = 0.0
    """Time in which the GPU waits for the CPU to launch kernels."""

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory + self.messages + self.launches

    def __add__(self, other: Time) -> Time:
        return Time(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, times: float) -> Time:
        return Time(**{f.name: getattr(self, f.name) * times for f in fields(self)})

    def at_least(self, seconds: float) -> Time:
        """Return this time, with launches added where it is shorter than ``seconds``."""
        return replace(self, launches=self.launches + max(0.0, seconds - self.total))


@dataclass(frozen=True)
class Passes:
    """Times of one micro-batch, forward and backward."""

    forward: Time = Time()
    backward: Time = Time()


def product_rate(run: RunConfig, gpu: Gpu, efficiency: float) -> float:
    """Return operations per second at ``efficiency`` of the peak, in float32 or bfloat16."""
    return (gpu.fp32_tflops if run.training.precision == "fp32" else gpu.bf16_tflops) * 1e12 * efficiency


class Compute:
    """Predicted times of one rank's share of a micro-batch."""

    def __init__(self, run: RunConfig, vocabulary_rows: int, links: Links) -> None:
        self.run, self.links, self.rows = run, links, vocabulary_rows
        parallel, assumed = run.parallel, links.assumptions
        self.size = value_bytes(run)
        self.tensor = parallel.tensor_model_parallel_size
        self.tokens = run.model.seq_length // parallel.context_parallel_size * run.training.micro_batch_size
        self.bandwidth = links.gpu.memory_gb_s * 1e9 * assumed.memory_efficiency
        self.plain_rate = product_rate(run, links.gpu, assumed.matmul_efficiency)
        self.attention_rate = product_rate(run, links.gpu, assumed.attention_efficiency)
        self.launch = assumed.layer_launch_us * 1e-6

    @cached_property
    def layer(self) -> Passes:
        """A layer of prelude or coda."""
        return self._layer(core=False)

    @cached_property
    def core_layer(self) -> Passes:
        """A layer of the core, possibly with experts."""
        return self._layer(core=True)

    @cached_property
    def later_core_layer(self) -> Passes:
        """The same in loops after the first, which may share its keys and values."""
        return self._layer(core=True, later=True) if self.run.model.shares_keys else self.core_layer

    def of_core(self, chunk: int) -> Passes:
        """Return the times of a core layer in chunk ``chunk`` of the ring, which is a loop's number."""
        return self.later_core_layer if chunk > 1 else self.core_layer

    @cached_property
    def head(self) -> Passes:
        """Output matrix and loss, whose forward pass also computes the gradients: all three products are in it."""
        rows = self.rows / self.tensor
        count = 1 if self.run.model.exit_gate_only else 3
        products = count * 2 * self.tokens * self.run.model.hidden_size * rows / self.plain_rate
        return Passes(Time(products=products, memory=4 * self.tokens * rows * self.size / self.bandwidth))

    def boundary(self, cycle: int) -> Passes:
        """Return the time of state passing at the end of ``cycle``, from the table in docs/performance.md."""
        forward, backward = scheme_spec(self.run.model).boundary_traffic(cycle, self.size)
        second = hop_bytes(self.run) / self.bandwidth
        return Passes(Time(memory=forward * second), Time(memory=backward * second))

    def _layer(self, core: bool, later: bool = False) -> Passes:
        model, parallel = self.run.model, self.run.parallel
        experts = core and model.num_experts is not None
        macs, share = layer_macs(model, core, own_keys=not later), self.tokens / self.tensor
        parameters = layer_parameters_of_rank(model, parallel, core)
        products = max(
            2 * share * (macs.projections + macs.feed_forward) / self._rate(core),
            parameters * self.size / self.bandwidth,
        )
        attention = 2 * share * macs.attention / self.attention_rate
        sizes = activation_sizes(keeping_all(self.run), self.rows)
        kept = (sizes.later_core_layer if later else sizes.core_layer) if core else sizes.layer
        memory = 2 * kept / self.bandwidth
        gradients = 2 * FLOAT32 * parameters / self.bandwidth
        states, weights = self._dropout()
        sent_forward, sent_backward = self._messages(experts)
        if core:
            sent_forward += self._low_rank(backward=False)
            sent_backward += self._low_rank() - self._low_rank(backward=False)
        forward = Time(products=products, attention=attention, memory=memory + states + weights)
        again = forward if parallel.recompute_granularity == "full" else Time()
        if parallel.recomputes("core_attn"):
            again += Time(attention=attention, memory=weights)
        if parallel.recomputes("moe" if experts else "mlp"):
            again += Time(products=2 * share * macs.feed_forward / self._rate(core))
        if experts and parallel.recomputes("shared_experts"):
            again += Time(products=2 * share * macs.shared_expert / self._rate(core))
        if parallel.recomputes("layernorm"):
            again += Time(memory=4 * sizes.state / self.bandwidth)
        if model.attention_dropout:  # its backward pass always begins with the scores
            again += Time(attention=attention, memory=weights)
        backward = Time(
            products=2 * products,
            attention=ATTENTION_BACKWARD * attention,
            memory=2 * memory + gradients + states + weights,
        )
        launches = 2 if parallel.recompute_granularity == "full" else 1
        return Passes(
            (forward + Time(messages=sent_forward)).at_least(self.launch),
            (backward + again + Time(messages=sent_backward)).at_least(launches * self.launch),
        )

    def _dropout(self) -> tuple[float, float]:
        """Return the seconds of dropout in one pass of a layer: of its two branches, and of attention's weights."""
        model, split = self.run.model, self.tensor if self.run.parallel.sequence_parallel else 1
        values = 2 * self.tokens // split * model.hidden_size if model.hidden_dropout else 0
        scores = self.tokens * model.num_attention_heads // self.tensor * model.seq_length // 2
        second = DROPOUT_BYTES / self.bandwidth
        return values * second, scores * second if model.attention_dropout else 0.0

    def _rate(self, core: bool) -> float:
        """Return operations per second of a layer's products; raise ``ValueError`` if the GPU lacks their FP8."""
        fp8, gpu = self.run.fp8, self.links.gpu
        if fp8.fp8_format is None or (fp8.fp8_core_only and not core):
            return self.plain_rate
        if gpu.fp8_tflops is None:
            raise ValueError(
                f"--fp8-format {fp8.fp8_format}: {gpu.name} has no FP8; drop the flag or choose another --gpu"
            )
        return gpu.fp8_tflops * 1e12 * self.links.assumptions.fp8_matmul_efficiency

    def _messages(self, experts: bool) -> tuple[float, float]:
        """Return the seconds of communication in one layer, forward and backward."""
        run, parallel = self.run, self.run.parallel
        calls = layer_collectives(run, experts)
        forward = layer_collectives(run, experts, backward=False)
        sent_forward = self._tensor(forward)
        sent_backward = self._tensor(
            Collectives(
                calls.all_reduce - forward.all_reduce,
                calls.all_gather - forward.all_gather,
                calls.reduce_scatter - forward.reduce_scatter,
            )
        )
        ranks = parallel.context_parallel_size
        width = run.model.query_groups * run.model.head_size // self.tensor
        keys = self.links.collective(self.tokens * width * self.size * (ranks - 1), ranks, self.tensor)
        sent_forward += 2 * keys
        full = parallel.recompute_granularity == "full"
        sent_backward += (4 if full or parallel.recomputes("core_attn") else 2) * keys
        if experts:
            exchange = self._experts()
            sent_forward += exchange
            sent_backward += (2 if full or parallel.recomputes("moe") else 1) * exchange
        return sent_forward, sent_backward

    def _low_rank(self, backward: bool = True) -> float:
        """Return the seconds to sum or gather what low-rank differences of one core layer need."""
        costs = low_rank_collectives(self.run, backward)
        if not costs.calls:
            return 0.0
        return costs.calls * self.links.collective(costs.sent / costs.calls * self.size, self.tensor, 1)

    def _experts(self) -> float:
        """Return the seconds to send tokens to their experts and back, once."""
        parallel, sent = self.run.parallel, expert_bytes(self.run)
        tensor = parallel.expert_tensor_size
        exchange = 2 * self.links.collective(sent.moved, parallel.expert_model_parallel_size, tensor)
        return exchange + sum(self.links.collective(part, tensor, 1) for part in (sent.gathered, sent.scattered))

    def _tensor(self, calls: Collectives) -> float:
        whole = hop_bytes(self.run) * (self.tensor if self.run.parallel.sequence_parallel else 1)
        share = whole * (self.tensor - 1) / self.tensor
        once = self.links.collective(share, self.tensor, 1)
        return (calls.all_gather + calls.reduce_scatter) * once + calls.all_reduce * self.links.collective(
            2 * share, self.tensor, 1, rounds=2
        )
