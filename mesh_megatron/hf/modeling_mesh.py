"""Recursive (looped) transformers with MeSH or additive state passing, in plain PyTorch and transformers.

This file travels with exported weights and is also a second specification of the model: it follows
"MeSH: Memory-as-State-Highways for Recursive Transformers" (arXiv 2510.07739) section by section.

Shapes: B batch, S positions of this call, D hidden size, H heads, G key-value heads, N head width, M memory slots.
"""

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mesh import MeshConfig

# Transformers 5.24 calls the key-value cache ``cache`` where earlier versions say ``past_key_values``.
_CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


@dataclass
class MeshModelOutput(BaseModelOutputWithPast):
    """``hidden_states`` holds the input of the first computed layer and each computed layer's output (the last one
    after the final norm); ``loop_states`` the states between blocks, see ``MeshModel``; ``exit_loops`` [B, S] the loops
    that each token ran, with ``exit_criterion``."""

    loop_states: tuple[Tensor, ...] | None = None
    exit_loops: Tensor | None = None


@dataclass
class MeshCausalLMOutput(CausalLMOutputWithPast):
    """``CausalLMOutputWithPast`` with the states between blocks and the loops of tokens, as ``MeshModelOutput``."""

    loop_states: tuple[Tensor, ...] | None = None
    exit_loops: Tensor | None = None


class MeshRMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BSD: Tensor) -> Tensor:
        return scaled_norm(x_BSD, self.weight, self.eps)


class MeshNormOfLoops(nn.Module):
    """Norm of a core layer with weights [K, D] of each trained loop; later loops take the last one's."""

    def __init__(self, config: MeshConfig):
        super().__init__()
        self.config, shape = config, (config.num_trained_loops, config.hidden_size)
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if config.normalization == "LayerNorm" else None

    def forward(self, x_BSD: Tensor, loop: int) -> Tensor:
        loop = min(loop, len(self.weight) - 1)
        if self.bias is not None:
            return F.layer_norm(x_BSD, x_BSD.shape[-1:], self.weight[loop], self.bias[loop], self.config.norm_epsilon)
        return scaled_norm(x_BSD, self.weight[loop], self.config.norm_epsilon)


class MeshDifference(nn.Module):
    """B_t A_t x: what a matrix of the core is changed by in each trained loop; later loops take the last one's."""

    def __init__(self, config: MeshConfig, inputs: int, *outputs: int):
        super().__init__()
        self.config = config
        self.down = nn.Parameter(torch.empty(config.num_trained_loops, config.loop_lora_rank or 0, inputs))
        self.up = nn.Parameter(torch.zeros(config.num_trained_loops, *outputs, config.loop_lora_rank or 0))

    def forward(self, x_BSD: Tensor, loop: int) -> Tensor:
        loop = min(loop, len(self.down) - 1)
        return F.linear(F.linear(x_BSD, self.down[loop]), self.up[loop].flatten(0, -2))


def make_difference(config: MeshConfig, in_core: bool, inputs: int, *outputs: int) -> MeshDifference | None:
    return MeshDifference(config, inputs, *outputs) if in_core and config.loop_lora_rank is not None else None


def apply_linear(linear: nn.Module, difference: MeshDifference | None, x_BSD: Tensor, loop: int) -> Tensor:
    """Compute W x, or (W + B_t A_t) x."""
    return linear(x_BSD) if difference is None else linear(x_BSD) + difference(x_BSD, loop)


def make_norm(config: MeshConfig, width: int | None = None) -> nn.Module:
    norm = {"LayerNorm": nn.LayerNorm, "RMSNorm": MeshRMSNorm}[config.normalization]
    return norm(config.hidden_size if width is None else width, eps=config.norm_epsilon)


class MeshRotary(nn.Module):
    """Cosines and sines [B, 1, S, R] of rotary positions, which rotate the first ``rotary_percent`` of each head."""

    def __init__(self, config: MeshConfig):
        super().__init__()
        self.config = config

    def forward(self, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies, scale = self.frequencies(positions_BS.device)
        angles = positions_BS[:, None, :, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Compute the angle per position of each pair of channels, and the factor of cosines and sines."""
        config = self.config
        if config.rotary_scaling is not None:
            return ROPE_INIT_FUNCTIONS[config.rotary_scaling["rope_type"]](config, device)
        size = int(config.head_dim * config.rotary_percent)
        steps = torch.arange(0, size, 2, dtype=torch.float32, device=device)
        return 1.0 / config.rotary_base ** (steps / size), 1.0


def rotate(x_BHSN: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first channels of each head (channel j with j + R / 2) and leave the others unchanged."""
    rotated = cos.shape[-1]
    turned = x_BHSN[..., :rotated]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, x_BHSN[..., rotated:]), dim=-1)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T * scaling + mask) V in plain operations; returns [B, S, H, N] and the weights [B, H, S, T]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def output_projection(config: MeshConfig, width: int) -> nn.Linear:
    """Make a linear layer into the residual stream, with smaller initial weights than the others (Appendix B)."""
    projection = nn.Linear(width, config.hidden_size, bias=config.linear_bias)
    projection.initial_scale = (2 * config.num_computed_layers) ** -0.5
    return projection


class LoopKeys:
    """Keys and values of one call in the core's first loop, by cache entry, for later loops (share_kv_across_loops).

    They include those of earlier tokens in a cache. A cache of pages takes those of this call again in each loop, and
    puts them where they are.
    """

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, entry: int, key: Tensor, value: Tensor) -> None:
        """Keep a layer's keys and values, once: gradient checkpointing computes the first loop again."""
        self.kept.setdefault(entry, (key, value))


class ComputedAttention(nn.Module):
    """The attention of one computed layer, without weights: a layer that runs K times has K of them.

    With ``share_kv_across_loops`` it has one, because all its loops have one cache entry.

    Servers and caches ask the module that attends which layer it is: ``layer_idx`` is its key-value cache entry.
    """

    def __init__(self, config: MeshConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.has_differences = config.loop_lora_rank is not None
        self.is_causal = True

    def forward(self, query, key, value, attention_mask, past_key_values, keep_cache, **kwargs):
        """``query`` is [B, H, S, N], ``key`` and ``value`` [B, G, S, N]; returns [B, S, H, N] and weights or None.

        Without ``key`` and ``value`` it attends to those of the first loop in ``loop_keys``.
        """
        loop_keys: LoopKeys | None = kwargs.pop("loop_keys", None)
        if loop_keys is not None and key is None:
            key, value = loop_keys.kept[self.layer_idx]
        elif past_key_values is not None:
            length = key.shape[2]
            paged = {"kwargs": kwargs} if _CACHE == "cache" else {}  # a cache of pages puts its tables there
            key, value = past_key_values.update(key, value, self.layer_idx, **paged)
            if not keep_cache:
                past_key_values.layers[self.layer_idx].crop(-length)
        if loop_keys is not None:
            loop_keys.keep(self.layer_idx, key, value)
        servers = kwargs.get("attention_instances") if self.has_differences else None  # of vLLM
        if servers is not None and servers[self.layer_idx].num_heads != query.shape[1]:
            raise ValueError("loop_lora_rank: vLLM cannot split the core over tensor-parallel ranks; serve on one GPU")
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        return attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)


class MeshAttention(nn.Module):
    """Causal attention. ``query_key_value`` holds, for each key-value head, its query heads, its key, its value."""

    def __init__(self, config: MeshConfig, in_core: bool = False):
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_group = config.num_attention_heads // config.num_key_value_heads
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.q_layernorm = make_norm(config, config.head_dim) if config.qk_layernorm else None
        self.k_layernorm = make_norm(config, config.head_dim) if config.qk_layernorm else None
        self.query_key_value = nn.Linear(config.hidden_size, heads * config.head_dim, bias=config.qkv_bias)
        self.dense = output_projection(config, config.num_attention_heads * config.head_dim)
        width = heads * config.head_dim
        self.query_key_value_difference = make_difference(config, in_core, config.hidden_size, width)
        self.dense_difference = make_difference(config, in_core, self.dense.in_features, config.hidden_size)

    def forward(
        self,
        x_BSD: Tensor,
        computed: ComputedAttention,
        rotary: tuple[Tensor, Tensor],
        exits=None,
        loop: int = 0,
        loop_keys: LoopKeys | None = None,
        **attention_inputs,
    ):
        batch, length, _ = x_BSD.shape
        qkv = apply_linear(self.query_key_value, self.query_key_value_difference, x_BSD, loop)
        qkv = qkv.view(batch, length, -1, self.queries_per_group + 2, self.head_dim)
        query = qkv[..., :-2, :].flatten(2, 3).transpose(1, 2)  # [B, H, S, N]
        query = rotate(query if self.q_layernorm is None else self.q_layernorm(query), *rotary)
        key = value = None
        if loop_keys is None or loop == 0:
            key, value = qkv[..., -2, :].transpose(1, 2), qkv[..., -1, :].transpose(1, 2)  # [B, G, S, N]
            key = rotate(key if self.k_layernorm is None else self.k_layernorm(key), *rotary)
            if exits is not None and loop_keys is None:
                key, value = exits.keys_and_values(computed.layer_idx, key, value)
        out, weights = computed(query, key, value, loop_keys=loop_keys, **attention_inputs)
        return apply_linear(self.dense, self.dense_difference, out.reshape(batch, length, -1), loop), weights


class MeshMLP(nn.Module):
    """Feed-forward: exact GELU, or SwiGLU with the gate's rows before the others in ``dense_h_to_4h``."""

    def __init__(self, config: MeshConfig, in_core: bool = False):
        super().__init__()
        self.swiglu = config.swiglu
        rows = config.intermediate_size * (2 if config.swiglu else 1)
        self.dense_h_to_4h = nn.Linear(config.hidden_size, rows, bias=config.linear_bias)
        self.dense_4h_to_h = output_projection(config, config.intermediate_size)
        parts = (2, config.intermediate_size) if config.swiglu else (config.intermediate_size,)
        self.dense_h_to_4h_difference = make_difference(config, in_core, config.hidden_size, *parts)
        self.dense_4h_to_h_difference = make_difference(config, in_core, config.intermediate_size, config.hidden_size)

    def forward(self, x_BSD: Tensor, loop: int = 0) -> Tensor:
        hidden = apply_linear(self.dense_h_to_4h, self.dense_h_to_4h_difference, x_BSD, loop)
        if self.swiglu:
            gate, up = hidden.chunk(2, dim=-1)
            activated = F.silu(gate) * up
        else:
            activated = F.gelu(hidden)
        return apply_linear(self.dense_4h_to_h, self.dense_4h_to_h_difference, activated, loop)


class MeshLayer(GradientCheckpointingLayer):
    """One transformer layer, with GPT-NeoX's parallel residual or the sequential one."""

    def __init__(self, config: MeshConfig, in_core: bool = False):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.norms_of_loops = in_core and config.per_loop_norms
        self.input_layernorm = self.norm(config)
        self.attention = MeshAttention(config, in_core)
        self.post_attention_layernorm = self.norm(config)  # before the feed-forward layer, as GPT-NeoX calls it
        self.mlp = MeshMLP(config, in_core)
        self.attention_output_layernorm = self.norm(config) if config.sandwich_norm else None
        self.mlp_output_layernorm = self.norm(config) if config.sandwich_norm else None
        self.dropout = nn.Dropout(config.hidden_dropout)

    def norm(self, config: MeshConfig) -> nn.Module:
        return MeshNormOfLoops(config) if self.norms_of_loops else make_norm(config)

    def forward(self, x_BSD: Tensor, loop: int = 0, **attention_inputs) -> Tensor:
        which = (loop,) if self.norms_of_loops else ()
        attended = self.attention(self.input_layernorm(x_BSD, *which), loop=loop, **attention_inputs)[0]
        if self.attention_output_layernorm is not None:
            attended = self.attention_output_layernorm(attended, *which)
        between = x_BSD + self.dropout(attended)
        mlp = self.mlp(self.post_attention_layernorm(x_BSD if self.parallel_residual else between, *which), loop)
        if self.mlp_output_layernorm is not None:
            mlp = self.mlp_output_layernorm(mlp, *which)
        return between + self.dropout(mlp)


class KeepsFloat32(nn.Module):
    """Base of modules whose parameters stay float32, whatever the model is converted to."""

    def _apply(self, fn, recurse=True):
        """Move, but never convert."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class Float32Parameters(KeepsFloat32):
    """Parameters by name, given as shape and initial value, which stay float32.

    An initial value is a number for the diagonal, numbers along the last axis (one fills it), or None for random ones.
    The module is no ``nn.Linear``, which clients quantise, adapt or convert.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    scale: nn.Parameter
    logit: nn.Parameter

    def __init__(self, **described: tuple[tuple[int, ...], float | list[float] | None]):
        super().__init__()
        self.starts = {name: start for name, (_, start) in described.items()}
        for name, (shape, _) in described.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))

    def initialize(self, std: float) -> None:
        """Set the initial values; random ones are from N(0, ``std``)."""
        for name, start in self.starts.items():
            parameter = self.get_parameter(name)
            if start is None:
                init.normal_(parameter, std=std)
            elif isinstance(start, float):
                init.copy_(parameter, torch.eye(*parameter.shape) * start)
            else:
                init.copy_(parameter, torch.tensor(start))


class Float32Router(Float32Parameters):
    """A linear layer whose weights stay float32, and which computes in it in any precision and under autocast."""

    def __init__(
        self, hidden_size: int, rows: int, initial_bias: list[float] | None = None, scale: float | None = None
    ):
        """``scale`` is the initial value of a learned factor of the weight; None for none."""
        scaled: dict[str, Any] = {} if scale is None else {"scale": ((1,), [scale])}
        super().__init__(weight=((rows, hidden_size), None), bias=((rows,), initial_bias or [0.0]), **scaled)

    def forward(self, x_BSD: Tensor) -> Tensor:
        with torch.autocast(x_BSD.device.type, enabled=False):
            weight = self.weight.float() * self.scale.float() if hasattr(self, "scale") else self.weight.float()
            return F.linear(x_BSD.float(), weight, self.bias.float())


class Exits:
    """Tokens of one call that have left the core, and what they leave behind (``MeshConfig.exit_criterion``).

    A token that has left keeps its state, which enters the coda, and in all later loops the keys and values of its last
    loop (of the first, if loops share them): later tokens see these, in this call and from the cache. So a token's
    result depends on earlier tokens alone, not on how a text is cut into calls, nor on other sequences of the batch.
    """

    def __init__(
        self, config: MeshConfig, readout: Callable[[Tensor], Tensor] | None, gate: Callable[[Tensor], Tensor] | None
    ):
        """``readout`` computes logits from a state, for ``kl``; ``gate`` one logit [B, S, 1], for ``gate``."""
        self.config, self.readout, self.gate = config, readout, gate
        self.state: Tensor  # [B, S, D] enters the coda
        self.loops: Tensor  # [B, S] loops that each token has run
        self.left: Tensor  # [B, S]
        self.before: Tensor  # the measured quantity after the previous loop, or the logarithm of what is still there
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of the last loop, by cache entry

    def after(self, loop: int, state: Tensor) -> bool:
        """Take the states [B, S, D] that would enter the coda after ``loop`` (from 0); return whether all have left."""
        if loop == 0:
            self.state, self.loops = state, torch.ones(state.shape[:2], dtype=torch.long, device=state.device)
            self.left = torch.zeros_like(self.loops, dtype=torch.bool)
        else:
            self.state = torch.where(self.left[..., None], self.state, state)
            self.loops = self.loops + ~self.left
        self.left = self.left | self.leave(loop, state).to(state.device)  # the readout may be on another device
        return bool(self.left.all())

    def leave(self, loop: int, state: Tensor) -> Tensor:
        """Return which tokens leave after ``loop`` if they have not left before, [B, S]."""
        if self.gate is not None:
            stay = F.logsigmoid(-self.gate(state).squeeze(-1))  # log of the probability to go on
            self.before = stay if loop == 0 else self.before.to(stay.device) + stay
            return -self.before.expm1() >= self.config.exit_threshold
        measured = self.measured(state)
        small = self.left if loop == 0 else self.difference(measured) < self.config.exit_threshold
        self.before = measured
        return small

    def measured(self, state: Tensor) -> Tensor:
        if self.config.exit_criterion == "change":
            return state.float()
        if self.readout is None:
            raise ValueError("exit_criterion 'kl' needs a model with an output matrix (MeshForCausalLM)")
        return self.readout(state).float().log_softmax(-1)

    def difference(self, after: Tensor) -> Tensor:
        """Compute how much a loop has changed each token, [B, S]."""
        if self.config.exit_criterion == "change":
            return (after - self.before).norm(dim=-1) / after.norm(dim=-1)
        return (after.exp() * (after - self.before)).sum(-1)

    def keys_and_values(self, entry: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of cache entry ``entry``, in which tokens that have left keep their last ones."""
        before = self.kept.pop(entry - self.config.num_core_layers, None)
        if before is not None:
            left = self.left[:, None, :, None].to(key.device)
            key, value = torch.where(left, before[0], key), torch.where(left, before[1], value)
        self.kept[entry] = key, value
        return key, value

    def fill(self, cache: Cache | None) -> None:
        """Fill the entries of loops that no token ran, so that all entries hold as many positions.

        In their order: a cache that keeps its entries elsewhere (offloaded) fetches the next one meanwhile.
        """
        first_coda_entry = self.config.num_computed_layers - self.config.num_coda_layers
        for entry in range(max(self.kept, default=first_coda_entry) + 1, first_coda_entry):
            self.kept[entry] = key, value = self.kept[entry - self.config.num_core_layers]
            if cache is not None:
                cache.update(key, value, entry)


class Recurrence(KeepsFloat32):
    """The base recursion, h(t+1) = f_core(h(t)), and the base class of all schemes.

    h(0) = f_pre(h_emb). Most schemes only differ in ``next_state``.
    """

    def __init__(self, config: MeshConfig):
        super().__init__()
        self.config = config
        if config.exit_gate:
            self.exit_gate = Float32Router(config.hidden_size, 1)
        if config.loop_norm:
            self.loop_norm = Float32Parameters(weight=((config.hidden_size,), [1.0]))
        if config.loop_embedding:
            self.loop_embedding = Float32Parameters(weight=((config.num_trained_loops, config.hidden_size), [0.0]))

    @property
    def loops(self) -> int:
        """Number of loops that the model runs now."""
        return self.config.num_loops

    def forward(self, embedding: Tensor, prelude: Callable, core: Callable, exits: Exits | None = None) -> list[Tensor]:
        """Run all cycles, or until all tokens have left; return h_emb and the state after each cycle."""
        first = state = prelude(embedding)
        states = [embedding, first]
        for loop in range(self.loops):
            output = core(loop, state)
            # In a model spread over devices, tensors may be on different ones: compute on the device of the newest.
            earlier = (x.to(output.device) for x in (state, first, embedding))
            state = self.next_state(output, *earlier)
            states.append(state)
            if exits is not None and exits.after(loop, state):
                break
        return states

    def core_input(self, loop: int, state: Tensor) -> Tensor:
        """Return what the core reads in a loop: RMSNorm(h(t)) + e_t, if the model has either."""
        if self.config.loop_norm:
            state = scaled_norm(state, self.loop_norm.weight.to(state.device), self.config.norm_epsilon)
        if self.config.loop_embedding:
            vectors = self.loop_embedding.weight.to(state.device)
            state = (state.float() + vectors[min(loop, len(vectors) - 1)]).to(state.dtype)
        return state

    def next_state(self, output: Tensor, state: Tensor, first: Tensor, embedding: Tensor) -> Tensor:
        """Compute h(t+1) from f_core(h(t)), h(t), h(0) and h_emb."""
        return output

    def initialize(self) -> None:
        """Set initial values of the parameters that are this module's own, and not a submodule's."""


class SumRecurrence(Recurrence):
    """h(t+1) = f_core(h(t)) plus any of h(t), h(0) and h_emb (Section 3.1, Appendix E)."""

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        self.terms = config.recurrence.split("+")

    def next_state(self, output: Tensor, state: Tensor, first: Tensor, embedding: Tensor) -> Tensor:
        sources = {"residual": state, "anchor": first, "anchor_emb": embedding}
        for term in self.terms:
            output = output + sources[term]
        return output


class StaticRecurrence(Recurrence):
    """h(t+1) = a1 f_core(h(t)) + a2 h(0) + a3 h_emb with three trained scalars; starts as the base recursion."""

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        self.coefficients = nn.Parameter(torch.ones(3, dtype=torch.float32))

    def next_state(self, output: Tensor, state: Tensor, first: Tensor, embedding: Tensor) -> Tensor:
        return weighted_sum(self.coefficients.float().to(output.device).unbind(), (output, first, embedding))

    def initialize(self) -> None:
        init.copy_(self.coefficients, torch.tensor([1.0, 0.0, 0.0]))


class DynamicRecurrence(Recurrence):
    """As `static`, with coefficients per token: a linear function of the state that enters the core."""

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        self.router = Float32Router(config.hidden_size, 3, initial_bias=[1.0, 0.0, 0.0])

    def next_state(self, output: Tensor, state: Tensor, first: Tensor, embedding: Tensor) -> Tensor:
        return weighted_sum(self.router(state).to(output.device).unbind(-1), (output, first, embedding))


class MeshRecurrence(Recurrence):
    """State passing through a memory of M slots, one write and one read per cycle (Section 3.2).

    With m_0 = h_emb and the other slots empty, cycle c writes w_b * y_c to every slot b and reads the next state as
    sum_b r_b * m_b. Slots are linear combinations of h_emb and y, so they are never stored:

        s_{c+1} = r_0 * h_emb + sum_{i <= c} <r, w_i> * y_i

    Run more often than trained, several cycles take the same router (``MeshConfig.own_cycle``): each replaces what the
    one before it wrote, so that the memory holds as many outputs as in training.
    """

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        self.input, self.gate = config.router_input, config.router_gate
        self.temperature = config.router_temperature
        self.routers = nn.ModuleList(
            Float32Router(config.hidden_size, 2 * config.num_memory_slots, scale=config.router_scale)
            for _ in range(config.num_trained_loops + 1)
        )

    def forward(self, embedding: Tensor, prelude: Callable, core: Callable, exits: Exits | None = None) -> list[Tensor]:
        state, states = embedding, [embedding]
        outputs: dict[int, Tensor] = {}  # by router
        writes: dict[int, Tensor] = {}

        def written(router: int, write: Tensor, read: Tensor, output: Tensor) -> Tensor:
            """Return the next state after ``router`` has written and read."""
            all_writes, all_outputs = {**writes, router: write}, {**outputs, router: output}
            return self.read(read, list(all_writes.values()), embedding, list(all_outputs.values()))

        for cycle in range(self.loops + 1):
            router = self.config.own_cycle(cycle)
            write, read = self.route(cycle, state)
            output = prelude(state) if cycle == 0 else core(cycle - 1, state)
            following = written(router, write, read, output)
            states.append(following)
            if exits is not None and cycle > 0:
                # As if this cycle were the last, which has a router of its own.
                last = written(self.config.num_trained_loops, *self.route(self.loops, state), output)
                if exits.after(cycle - 1, last):
                    break
            writes[router], outputs[router], state = write, output, following
        return states

    def route(self, cycle: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """Compute write and read weights over the slots, [B, S, M] each, from the state that enters the cycle.

        (w, r) = gate((a W x + b) / T), with x the state or a norm of it; the softmax is over each half by itself.
        """
        if self.input == "normalized":
            state = F.layer_norm(state, state.shape[-1:])
        elif self.input == "rmsnorm":
            state = F.rms_norm(state, state.shape[-1:], eps=1e-5)
        write, read = (self.routers[self.config.own_cycle(cycle)](state) / self.temperature).chunk(2, dim=-1)
        if self.gate == "sigmoid":
            return write.sigmoid(), read.sigmoid()
        return write.softmax(dim=-1), read.softmax(dim=-1)

    def read(self, read: Tensor, writes: list[Tensor], embedding: Tensor, outputs: list[Tensor]) -> Tensor:
        """Compute the next state, accumulated in float32."""
        device = outputs[-1].device  # in a model spread over devices, tensors may be on different ones
        read = read.to(device)
        state = read[..., :1] * embedding.to(device).float()
        for write, output in zip(writes, outputs, strict=True):
            state = state + (read * write.to(device)).sum(-1, keepdim=True) * output.to(device).float()
        return state.to(outputs[-1].dtype)


class AdapterRecurrence(Recurrence):
    """h(t+1) = W [f_core(h(t)), h_emb] + b, in the states' precision; starts as the base recursion."""

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        width = config.hidden_size
        self.adapter = Float32Parameters(weight=((width, 2 * width), 1.0), bias=((width,), [0.0]))

    def next_state(self, output: Tensor, state: Tensor, first: Tensor, embedding: Tensor) -> Tensor:
        weight, bias = (parameter.to(output) for parameter in (self.adapter.weight, self.adapter.bias))
        return F.linear(torch.cat([output, embedding], dim=-1), weight, bias)


class DecayRecurrence(Recurrence):
    """h(t+1) = A * f_core(h(t)) + B h(0) with A = sigmoid(a) in (0, 1) per channel; B is diagonal or a matrix."""

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        width, start = config.hidden_size, 0.2**0.5
        self.decay = Float32Parameters(logit=((width,), [math.log(start / (1 - start))]))
        linear = config.decay_input == "linear"
        self.injection = Float32Parameters(weight=((width, width), 1 - start) if linear else ((width,), [1 - start]))

    def next_state(self, output: Tensor, state: Tensor, first: Tensor, embedding: Tensor) -> Tensor:
        logit, weight = self.decay.logit.to(output.device), self.injection.weight.to(output.device)
        injected = F.linear(first, weight.to(first.dtype)) if weight.dim() == 2 else first.float() * weight
        return (logit.sigmoid() * output.float() + injected).to(output.dtype)


class HyperRecurrence(Recurrence):
    """Hyper-connections between loops: n lanes of state, all h(0) at first.

    A loop reads h = sum_j r_j l_j and writes l_i := sum_j M_ij l_j + w_i f_core(h); the coda reads the lanes too.
    Lane j has the row (r_j, w_j, M_1j, .., M_nj) in the loop's bias. Loops beyond the trained ones take the last one's.
    """

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        self.count, self.epsilon, self.width = config.hyper_lanes, config.norm_epsilon, config.hidden_size
        loops = range(config.num_trained_loops)
        self.lanes = nn.ModuleList(self.numbers(self.count + 2, self.start(loop)) for loop in loops)
        self.output = self.numbers(1, [1 / self.count])

    def numbers(self, rows: int, start: list[float]) -> Float32Parameters:
        """Make a loop's numbers, ``rows`` per lane."""
        return Float32Parameters(bias=((rows * self.count,), start))

    def start(self, loop: int) -> list[float]:
        """Return the initial numbers: r one-hot, w one, M the identity."""
        numbers: list[float] = []
        for lane in range(self.count):
            numbers += [float(lane == loop % self.count), 1.0, *(float(i == lane) for i in range(self.count))]
        return numbers

    def forward(self, embedding: Tensor, prelude: Callable, core: Callable, exits: Exits | None = None) -> list[Tensor]:
        """Run all cycles as the base class; a token that leaves takes the state that the coda would read."""
        lanes = [prelude(embedding)] * self.count
        states = [embedding, self.read(0, lanes)]
        for loop in range(self.loops):
            output = core(loop, states[-1])
            lanes = self.write(loop, [lane.to(output.device) for lane in lanes], output)
            states.append(self.read(loop + 1, lanes))
            if exits is not None and exits.after(loop, self.read(self.loops, lanes)):
                break
        return states

    def part(self, loop: int) -> Any:
        return self.lanes[min(loop, len(self.lanes) - 1)] if loop < self.loops else self.output

    def rows(self, loop: int, lanes: list[Tensor]) -> list[Tensor]:
        """Return each lane's numbers, [n + 2] or per token [B, S, n + 2]; for the coda, after the last loop, r_j."""
        return list(self.part(loop).bias.to(lanes[0].device).view(self.count, -1))

    def read(self, loop: int, lanes: list[Tensor]) -> Tensor:
        return weighted_sum([row[..., 0] for row in self.rows(loop, lanes)], lanes)

    def write(self, loop: int, lanes: list[Tensor], output: Tensor) -> list[Tensor]:
        rows = self.rows(loop, lanes)
        return [
            weighted_sum([*(row[..., 2 + i] for row in rows), rows[i][..., 1]], [*lanes, output])
            for i in range(self.count)
        ]


class HyperDynamicRecurrence(HyperRecurrence):
    """The same with 0.01 V l_j / rms(l_j) added to each lane's row, per token."""

    def numbers(self, rows: int, start: list[float]) -> Float32Parameters:
        return Float32Parameters(bias=((rows * self.count,), start), weight=((rows, self.width), [0.0]))

    def rows(self, loop: int, lanes: list[Tensor]) -> list[Tensor]:
        weight = self.part(loop).weight.to(lanes[0].device)
        dynamic = [normalised_product(lane, weight, self.epsilon) for lane in lanes]
        return [row + 0.01 * shift for row, shift in zip(super().rows(loop, lanes), dynamic, strict=True)]


class AttendRecurrence(Recurrence):
    """s_{c+1} = sum_i softmax_i(<q_c, v_i / rms(v_i)> + b_ci) v_i over the history v = (h_emb, y_0, .., y_c).

    Run more often than trained, several cycles take the same query (``MeshConfig.own_cycle``): each output replaces the
    one before it in the history.
    """

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        self.epsilon = config.norm_epsilon
        self.queries = nn.ModuleList(
            Float32Parameters(weight=((config.hidden_size,), [0.0]), bias=((cycle + 2,), [0.0]))
            for cycle in range(config.num_trained_loops + 1)
        )

    def forward(self, embedding: Tensor, prelude: Callable, core: Callable, exits: Exits | None = None) -> list[Tensor]:
        """Run all cycles as the base class; a token that leaves takes what the last query reads."""
        history, states, trained = {0: embedding}, [embedding], self.config.num_trained_loops
        for cycle in range(self.loops + 1):
            own = self.config.own_cycle(cycle)
            output = prelude(embedding) if cycle == 0 else core(cycle - 1, states[-1])
            earlier = {place: state.to(output.device) for place, state in history.items()}
            history = earlier | {own + 1: output}  # by place in the queries' biases
            states.append(self.read(self.queries[own], history))
            if exits is None or cycle == 0:
                continue
            # As if this cycle were the last, which has a query of its own.
            last = self.read(self.queries[trained], earlier | {trained + 1: output})
            if exits.after(cycle - 1, last):
                break
        return states

    def read(self, query: Any, history: dict[int, Tensor]) -> Tensor:
        states = list(history.values())
        weight, bias = query.weight.to(states[-1].device), query.bias.to(states[-1].device)
        scores = torch.cat([normalised_product(state, weight[None], self.epsilon) for state in states], dim=-1)
        return weighted_sum((scores + bias[list(history)]).softmax(dim=-1).unbind(-1), states)


def weighted_sum(coefficients: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
    """Compute the sum of states [B, S, D] times their coefficients, numbers or [B, S], in float32."""
    total = torch.zeros_like(states[0], dtype=torch.float32)
    for coefficient, state in zip(coefficients, states, strict=True):
        total = total + coefficient.unsqueeze(-1) * state.float()
    return total.to(states[0].dtype)


def normalised_product(state: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Compute V x / rms(x) in float32, [B, S, rows], from the state x [B, S, D] and V [rows, D]."""
    with torch.autocast(state.device.type, enabled=False):
        return F.linear(rms_normalised(state, epsilon), weight)


def rms_normalised(state: Tensor, epsilon: float) -> Tensor:
    """Compute x / rms(x) in float32."""
    state = state.float()
    return state * torch.rsqrt(state.square().mean(-1, keepdim=True) + epsilon)


def scaled_norm(state: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """Compute x / rms(x) times ``scale`` [D], in float32 and then the state's precision."""
    return (rms_normalised(state, epsilon) * scale.float()).to(state.dtype)


RECURRENCES: dict[str, type[Recurrence]] = {
    "base": Recurrence,
    "residual": SumRecurrence,
    "anchor": SumRecurrence,
    "anchor_emb": SumRecurrence,
    "residual+anchor": SumRecurrence,
    "anchor+anchor_emb": SumRecurrence,
    "residual+anchor+anchor_emb": SumRecurrence,
    "static": StaticRecurrence,
    "dynamic": DynamicRecurrence,
    "mesh": MeshRecurrence,
    "adapter": AdapterRecurrence,
    "decay": DecayRecurrence,
    "hyper": HyperRecurrence,
    "hyper-dynamic": HyperDynamicRecurrence,
    "attend": AttendRecurrence,
}


def in_own_memory(state_BSD: Tensor) -> Tensor:
    """Copy a block's output, which compilers otherwise compute as a part of what reads it.

    Compiled by vLLM for a CPU, linear layers fill their outputs in place. torch 2.13 forgets that a block's output, the
    sum of several, must wait for them where it is mixed with other states (PyTorch issue 185509, fixed by 2.15).
    """
    return torch.stack((state_BSD, state_BSD))[0]


class MeshPreTrainedModel(PreTrainedModel):
    config: MeshConfig
    config_class = MeshConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MeshLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = ["recurrence"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MeshLayer, "attentions": MeshAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights from N(0, ``initializer_range``), output projections divided by sqrt(2 N_compute) (Appendix B).

        Biases are zero, except where a recurrence says otherwise.
        """
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and hasattr(module, "initial_scale"):
            init.normal_(module.weight, std=self.config.initializer_range * float(module.initial_scale))  # type: ignore[arg-type]
        elif isinstance(module, Float32Parameters):
            module.initialize(self.config.initializer_range)
        elif isinstance(module, Recurrence):
            module.initialize()
        elif isinstance(module, MeshDifference):
            init.normal_(module.down, std=self.config.initializer_range)
            init.zeros_(module.up)
        elif isinstance(module, MeshNormOfLoops):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)

    def set_num_loops(self, loops: int) -> None:
        """Run the shared core ``loops`` times from now on; see ``MeshModel.set_num_loops``."""
        model: Any = self.base_model
        model.set_num_loops(loops)

    def floating_point_ops(self, input_dict: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """Count a training step's operations: 6 per token and weight, a shared core's weights once for each loop."""
        ids, embeds = input_dict.get("input_ids"), input_dict.get("inputs_embeds")
        tokens = ids.numel() if ids is not None else embeds[..., 0].numel()  # type: ignore[index]
        names = dict(self.base_model.named_parameters())
        core = sum(weight.numel() for name, weight in names.items() if name.startswith("core."))
        loops, trained = self.config.num_loops, self.config.num_trained_loops
        repeats = loops - 1 if self.config.share_core and core else 0
        kinds = MeshDifference, MeshNormOfLoops
        owners = (module for module in self.base_model.modules() if isinstance(module, kinds))
        of_loops = sum(weight.numel() for module in owners for weight in module.parameters())  # one share in each loop
        more = repeats * (core - of_loops) + (of_loops // trained * (loops - trained) if of_loops else 0)
        return 6 * tokens * (self.num_parameters(exclude_embeddings=exclude_embeddings) + more)


class MeshModel(MeshPreTrainedModel):
    """Embedding, prelude, looped core, coda, final norm.

    With ``output_hidden_states`` the output has ``loop_states``, K + 3 tensors [B, S, D]: h_emb, the state that enters
    loop 0, ..., the state that enters loop K-1, the state that enters the coda, the coda's output before the final
    norm. (For mesh the first K + 2 are s_0 .. s_{K+1}; for the others h_emb, h(0) .. h(K).)
    """

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        config.check_loops()
        loops = 1 if config.share_core else config.num_loops
        self.embed_in: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.prelude = nn.ModuleList(MeshLayer(config) for _ in range(config.num_prelude_layers))
        self.core = nn.ModuleList(MeshLayer(config, in_core=True) for _ in range(config.num_core_layers * loops))
        self.coda = nn.ModuleList(MeshLayer(config) for _ in range(config.num_coda_layers))
        self.attentions = nn.ModuleList(ComputedAttention(config, index) for index in range(config.num_attentions))
        self.recurrence = RECURRENCES[config.recurrence](config)
        self.final_layer_norm = make_norm(config)
        self.rotary = MeshRotary(config)
        self.embedding_scale = config.hidden_size**0.5 if config.embedding_scaling else 1.0
        self.gradient_checkpointing = False
        self.post_init()

    def set_num_loops(self, loops: int) -> None:
        """Run the shared core ``loops`` times from now on, as ``MeshConfig.own_cycle`` says.

        A cache of another number of loops no longer fits. Raises ``ValueError`` if ``loops`` is no integer or the core
        is not shared.
        """
        try:
            number = operator.index(loops)
        except TypeError:
            raise ValueError(f"num_loops {loops!r} must be an integer") from None
        before, self.config.num_loops = self.config.num_loops, number
        try:
            self.config.check_loops()
        except ValueError:
            self.config.num_loops = before
            raise
        count = self.config.num_attentions
        more = [ComputedAttention(self.config, index) for index in range(len(self.attentions), count)]
        self.attentions = nn.ModuleList([*self.attentions[:count], *more]).train(self.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_in

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_in = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        readout: Callable[[Tensor], Tensor] | None = None,
        **kwargs,
    ) -> MeshModelOutput:
        """``inputs_embeds`` are rows of the embedding [B, S, D], before their scaling by sqrt(D). ``cache`` is
        ``past_key_values``, by its name since transformers 5.24; ``readout`` the output matrix, for exits by ``kl``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_in(input_ids)
        if cache is not None and _CACHE == "cache":
            past_key_values = cache
        elif cache is not None:
            kwargs["cache"] = cache  # of continuous batching, whose pages these versions fill in the attention function
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_key_values = self.usable_cache(past_key_values)
        self.check_cache(past_key_values)
        if position_ids is None:
            position_ids = self.positions(inputs_embeds, attention_mask, past_key_values)
        named_cache: dict[str, Any] = {_CACHE: past_key_values}
        inputs = {
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **named_cache,
            ),
            "rotary": self.rotary(position_ids, inputs_embeds.dtype),
            "past_key_values": past_key_values,
            **kwargs,
        }
        exits = self.start_exits(past_key_values, readout)
        leaving: dict[str, Any] = {} if exits is None else {"exits": exits}
        of_core = {**inputs, **leaving, "loop_keys": self.start_loop_keys()}
        states = self.recurrence(
            self.dropout(inputs_embeds * self.embedding_scale),
            prelude=lambda state: self.run_layers(self.prelude, state, 0, **inputs),
            core=lambda loop, state: self.run_core(loop, state, **of_core),
            **leaving,
        )
        if exits is not None:
            exits.fill(past_key_values)
            states[-1] = exits.state
        first_coda_entry = self.config.num_hidden_layers - self.config.num_coda_layers
        output = self.run_layers(self.coda, states[-1], first_coda_entry, **inputs)
        return MeshModelOutput(
            last_hidden_state=self.final_layer_norm(output),
            **named_cache,
            loop_states=(*states, output) if self.wants_states(kwargs) else None,
            exit_loops=None if exits is None else exits.loops,
        )

    def start_exits(self, cache: Any, readout: Callable[[Tensor], Tensor] | None) -> Exits | None:
        """Return what lets tokens of this call leave the core early; None if all run all loops."""
        config = self.config
        config.check_exits()
        if config.exit_criterion is None:
            return None
        attention = str(config._attn_implementation)
        plain_cache = cache is None or (isinstance(cache, Cache) and len(cache.layers) in (0, config.num_hidden_layers))
        if self.training or not plain_cache or attention == "vllm" or attention.startswith("paged"):
            raise ValueError(
                f"exit_criterion {config.exit_criterion!r} is for inference with a cache of transformers or none: call "
                "model.eval(), or set model.config.exit_criterion to None for training and for servers"
            )
        gate = self.recurrence.exit_gate if config.exit_criterion == "gate" else None
        return Exits(config, None if readout is None else lambda state: readout(self.final_layer_norm(state)), gate)

    def start_loop_keys(self) -> LoopKeys | None:
        """Return what keeps the first loop's keys and values of this call, if later loops attend to them."""
        if not self.config.share_kv_across_loops:
            return None
        if self.training and self.gradient_checkpointing:
            options = getattr(self._gradient_checkpointing_func, "keywords", {})
            if options.get("use_reentrant", True):
                raise ValueError(
                    "share_kv_across_loops: reentrant gradient checkpointing would lose gradients of keys and values; "
                    'give gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
        return LoopKeys()

    def run_core(self, loop: int, state: Tensor, **inputs) -> Tensor:
        """Run f_core in loop ``loop``; each loop has its own cache entries, unless loops share or replace them."""
        state = self.recurrence.core_input(loop, state)
        config, depth = self.config, self.config.num_core_layers
        layers = self.core if config.share_core else list(self.core)[loop * depth : (loop + 1) * depth]
        if not config.keeps_last_loop_only:
            earlier = 0 if config.share_kv_across_loops else loop * depth
            return self.run_layers(layers, state, config.num_prelude_layers + earlier, loop=loop, **inputs)
        last = loop == config.num_loops - 1
        return self.run_layers(layers, state, config.num_prelude_layers, keep_cache=last, loop=loop, **inputs)

    def run_layers(self, layers, state: Tensor, first_entry: int, keep_cache: bool = True, **inputs) -> Tensor:
        """Run ``layers`` in sequence, with key-value cache entries from ``first_entry`` on."""
        for offset, layer in enumerate(layers):
            state = layer(state, computed=self.attentions[first_entry + offset], keep_cache=keep_cache, **inputs)
        return in_own_memory(state) if self.config._attn_implementation == "vllm" and state.is_cpu else state

    def usable_cache(self, cache: Cache | None) -> Cache | None:
        """Return ``cache``; None if gradient checkpointing, which runs layers twice, would fill it twice."""
        if cache is None or not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return cache
        if cache.get_seq_length() > 0:
            raise ValueError(
                "past_key_values: gradient checkpointing runs layers twice and would extend the cache twice; leave the "
                "cache out, or call model.gradient_checkpointing_disable()"
            )
        return None

    def check_cache(self, cache: Any) -> None:
        """Raise ``ValueError`` if the cache is of a wrong kind, or it or the attentions for another number of loops."""
        kept = cache.layers if cache is not None and self.config.keeps_last_loop_only else []
        if any(type(layer) is not DynamicLayer for layer in kept):  # others cannot give up what a loop has written
            raise ValueError('kv_cache_loops="last" needs a plain dynamic cache: drop cache_implementation')
        if len(self.attentions) != self.config.num_attentions:
            raise ValueError(f"config.num_loops {self.config.num_loops} was changed: use model.set_num_loops instead")
        entries = len(cache.layers) if isinstance(cache, Cache) else 0
        if entries not in (0, self.config.num_hidden_layers):
            raise ValueError(
                f"the key-value cache has {entries} entries, and the model needs {self.config.num_hidden_layers} with "
                f"num_loops {self.config.num_loops}: start with an empty cache after the number of loops has changed"
            )

    def positions(self, inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Compute the positions of this call's tokens, [B, S] or [1, S]; left or right padding does not count."""
        length = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        past = cache.get_seq_length() if cache is not None else 0
        return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)

    def wants_states(self, kwargs: dict) -> bool:
        wanted = kwargs.get("output_hidden_states")
        return bool(self.config.output_hidden_states if wanted is None else wanted)


class MeshForCausalLM(MeshPreTrainedModel, GenerationMixin):
    """``MeshModel`` with an output matrix."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_in.weight"}

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        self.model = MeshModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def generate(
        self,
        *args,
        num_loops: int | None = None,
        exit_criterion: Literal["change", "kl", "gate"] | None = None,
        exit_threshold: float | None = None,
        **kwargs,
    ):
        """Generate as transformers does; with ``num_loops``, run the shared core so often in this call.

        With ``exit_criterion`` and ``exit_threshold``, let tokens leave the core early in this call: ``MeshConfig``,
        which also has what is not given. Raises ``ValueError`` for what the model cannot do.
        """
        config = self.config
        before = config.num_loops, config.exit_criterion, config.exit_threshold
        self.set_num_loops(before[0] if num_loops is None else num_loops)
        try:
            if exit_criterion not in (None, config.exit_criterion) and exit_threshold is None:
                raise ValueError(f"exit_criterion {exit_criterion!r}: give exit_threshold with it")
            if exit_criterion is not None or exit_threshold is not None:
                config.exit_criterion = before[1] if exit_criterion is None else exit_criterion
                config.exit_threshold = before[2] if exit_threshold is None else exit_threshold
                config.check_exits()
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.set_num_loops(before[0])
            config.exit_criterion, config.exit_threshold = before[1:]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> MeshCausalLMOutput:
        """``labels`` [B, S] are the input ids (the loss shifts them); -100 marks positions without loss."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **({"readout": self.lm_head} if self.config.exit_criterion == "kl" else {}),
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MeshCausalLMOutput(
            loss=loss,
            logits=logits,
            **{_CACHE: outputs.get(_CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            loop_states=outputs.loop_states,
            exit_loops=outputs.exit_loops,
        )


class MeshForSequenceClassification(GenericForSequenceClassification, MeshPreTrainedModel):
    """``MeshModel`` with a linear layer on the last token that is no padding."""

    def __init__(self, config: MeshConfig):
        MeshPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 0
        self.model = MeshModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class MeshForTokenClassification(GenericForTokenClassification, MeshPreTrainedModel):
    """``MeshModel`` with a linear layer on every token."""

    def __init__(self, config: MeshConfig):
        MeshPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 0
        self.model = MeshModel(config)
        self.dropout = nn.Dropout(0.1)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


# save_pretrained writes these files beside the weights, so that the folder loads where this package is not installed.
MeshConfig.register_for_auto_class()
MeshModel.register_for_auto_class("AutoModel")
MeshForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MeshForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MeshForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "MeshForCausalLM",
    "MeshForSequenceClassification",
    "MeshForTokenClassification",
    "MeshModel",
    "MeshPreTrainedModel",
]
