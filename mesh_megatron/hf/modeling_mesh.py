"""Recursive (looped) transformers with MeSH or additive state passing, in plain PyTorch and transformers.

This file travels with exported weights and is also a second specification of the model: it follows
"MeSH: Memory-as-State-Highways for Recursive Transformers" (arXiv 2510.07739) section by section.

Shapes: B batch, S positions of this call, D hidden size, H heads, G key-value heads, N head width, M memory slots.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    after the final norm); ``loop_states`` the states between blocks, see ``MeshModel``."""

    loop_states: tuple[Tensor, ...] | None = None


@dataclass
class MeshCausalLMOutput(CausalLMOutputWithPast):
    """``CausalLMOutputWithPast`` with the states between blocks, see ``MeshModel``."""

    loop_states: tuple[Tensor, ...] | None = None


class MeshRMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BSD: Tensor) -> Tensor:
        x = x_BSD.float()
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x_BSD.dtype)


def make_norm(config: MeshConfig, width: int | None = None) -> nn.Module:
    norm = {"LayerNorm": nn.LayerNorm, "RMSNorm": MeshRMSNorm}[config.normalization]
    return norm(config.hidden_size if width is None else width, eps=config.norm_epsilon)


class MeshRotary(nn.Module):
    """Cosines and sines of rotary positions, which rotate the first ``rotary_percent`` of each head."""

    def __init__(self, config: MeshConfig):
        super().__init__()
        self.config = config

    def forward(self, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies, scale = self.frequencies(positions_BS.device)
        angles = positions_BS[..., None].float() * frequencies
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
    turned, passed = x_BHSN[..., : cos.shape[-1]], x_BHSN[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1)


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


class ComputedAttention(nn.Module):
    """The attention of one computed layer, without weights: a layer that runs K times has K of them.

    Servers and caches ask the module that attends which layer it is: ``layer_idx`` is its key-value cache entry.
    """

    def __init__(self, config: MeshConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True

    def forward(self, query, key, value, attention_mask, past_key_values, keep_cache, **kwargs):
        """``query`` is [B, H, S, N], ``key`` and ``value`` [B, G, S, N]; returns [B, S, H, N] and weights or None."""
        if past_key_values is not None:
            length = key.shape[2]
            paged = {"kwargs": kwargs} if _CACHE == "cache" else {}  # a cache of pages puts its tables there
            key, value = past_key_values.update(key, value, self.layer_idx, **paged)
            if not keep_cache:
                past_key_values.layers[self.layer_idx].crop(-length)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        return attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)


class MeshAttention(nn.Module):
    """Causal attention. ``query_key_value`` holds, for each key-value head, its query heads, its key, its value."""

    def __init__(self, config: MeshConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_group = config.num_attention_heads // config.num_key_value_heads
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.q_layernorm = make_norm(config, config.head_dim) if config.qk_layernorm else nn.Identity()
        self.k_layernorm = make_norm(config, config.head_dim) if config.qk_layernorm else nn.Identity()
        self.query_key_value = nn.Linear(config.hidden_size, heads * config.head_dim, bias=config.qkv_bias)
        self.dense = output_projection(config, config.num_attention_heads * config.head_dim)

    def forward(self, x_BSD: Tensor, computed: ComputedAttention, rotary: tuple[Tensor, Tensor], **attention_inputs):
        batch, length, _ = x_BSD.shape
        qkv = self.query_key_value(x_BSD).view(batch, length, -1, self.queries_per_group + 2, self.head_dim)
        query = qkv[..., :-2, :].flatten(2, 3).transpose(1, 2)  # [B, H, S, N]
        key, value = qkv[..., -2, :].transpose(1, 2), qkv[..., -1, :].transpose(1, 2)  # [B, G, S, N]
        query, key = rotate(self.q_layernorm(query), *rotary), rotate(self.k_layernorm(key), *rotary)
        out, weights = computed(query, key, value, **attention_inputs)
        return self.dense(out.reshape(batch, length, -1)), weights


class MeshMLP(nn.Module):
    """Feed-forward: exact GELU, or SwiGLU with the gate's rows before the others in ``dense_h_to_4h``."""

    def __init__(self, config: MeshConfig):
        super().__init__()
        self.swiglu = config.swiglu
        rows = config.intermediate_size * (2 if config.swiglu else 1)
        self.dense_h_to_4h = nn.Linear(config.hidden_size, rows, bias=config.linear_bias)
        self.dense_4h_to_h = output_projection(config, config.intermediate_size)

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = self.dense_h_to_4h(x_BSD)
        if self.swiglu:
            gate, up = hidden.chunk(2, dim=-1)
            return self.dense_4h_to_h(F.silu(gate) * up)
        return self.dense_4h_to_h(F.gelu(hidden))


class MeshLayer(GradientCheckpointingLayer):
    """One transformer layer, with GPT-NeoX's parallel residual or the sequential one."""

    def __init__(self, config: MeshConfig):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = make_norm(config)
        self.attention = MeshAttention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MeshMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x_BSD: Tensor, **attention_inputs) -> Tensor:
        attended = self.dropout(self.attention(self.input_layernorm(x_BSD), **attention_inputs)[0])
        if self.parallel_residual:
            return x_BSD + attended + self.dropout(self.mlp(self.post_attention_layernorm(x_BSD)))
        x_BSD = x_BSD + attended
        return x_BSD + self.dropout(self.mlp(self.post_attention_layernorm(x_BSD)))


class Float32Router(nn.Module):
    """A linear layer whose weights stay float32, and which computes in it in any precision and under autocast.

    It is no ``nn.Linear``, which clients quantise, adapt or convert.
    """

    def __init__(self, hidden_size: int, rows: int, initial_bias: list[float] | None = None):
        super().__init__()
        self.initial_bias = initial_bias or [0.0] * rows
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(rows, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        """Move, but never convert."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def forward(self, x_BSD: Tensor) -> Tensor:
        with torch.autocast(x_BSD.device.type, enabled=False):
            return F.linear(x_BSD.float(), self.weight.float(), self.bias.float())


class Recurrence(nn.Module):
    """The base recursion, h(t+1) = f_core(h(t)), and the base class of all schemes.

    h(0) = f_pre(h_emb). Most schemes only differ in ``next_state``.
    """

    def __init__(self, config: MeshConfig):
        super().__init__()
        self.loops = config.num_loops

    def forward(self, embedding: Tensor, prelude: Callable, core: Callable) -> list[Tensor]:
        """Run all cycles; return h_emb and the state after each cycle."""
        first = state = prelude(embedding)
        states = [embedding, first]
        for loop in range(self.loops):
            output = core(loop, state)
            # In a model spread over devices, tensors may be on different ones: compute on the device of the newest.
            earlier = (x.to(output.device) for x in (state, first, embedding))
            state = self.next_state(output, *earlier)
            states.append(state)
        return states

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
        self.coefficients = nn.Parameter(torch.ones(3))

    def next_state(self, output: Tensor, state: Tensor, first: Tensor, embedding: Tensor) -> Tensor:
        return weighted_sum(self.coefficients.float().to(output.device), output, first, embedding)

    def initialize(self) -> None:
        init.copy_(self.coefficients, torch.tensor([1.0, 0.0, 0.0]))


class DynamicRecurrence(Recurrence):
    """As `static`, with coefficients per token: a linear function of the state that enters the core."""

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        self.router = Float32Router(config.hidden_size, 3, initial_bias=[1.0, 0.0, 0.0])

    def next_state(self, output: Tensor, state: Tensor, first: Tensor, embedding: Tensor) -> Tensor:
        return weighted_sum(self.router(state).to(output.device).unsqueeze(-2), output, first, embedding)


def weighted_sum(coefficients: Tensor, *sources: Tensor) -> Tensor:
    """Sum three states with ``coefficients`` [..., 3] in float32."""
    a1, a2, a3 = coefficients.unbind(-1)
    first, second, third = sources
    return (a1 * first.float() + a2 * second.float() + a3 * third.float()).to(first.dtype)


class MeshRecurrence(Recurrence):
    """State passing through a memory of M slots, one write and one read per cycle (Section 3.2).

    With m_0 = h_emb and the other slots empty, cycle c writes w_b * y_c to every slot b and reads the next state as
    sum_b r_b * m_b. Slots are linear combinations of h_emb and y, so they are never stored:

        s_{c+1} = r_0 * h_emb + sum_{i <= c} <r, w_i> * y_i
    """

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        self.normalized = config.router_input == "normalized"
        self.routers = nn.ModuleList(
            Float32Router(config.hidden_size, 2 * config.num_memory_slots) for _ in range(config.num_loops + 1)
        )

    def forward(self, embedding: Tensor, prelude: Callable, core: Callable) -> list[Tensor]:
        state, states = embedding, [embedding]
        outputs, writes = [], []
        for cycle in range(len(self.routers)):
            write, read = self.route(cycle, state)
            outputs.append(prelude(state) if cycle == 0 else core(cycle - 1, state))
            writes.append(write)
            state = self.read(read, writes, embedding, outputs)
            states.append(state)
        return states

    def route(self, cycle: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """Compute write and read weights over the slots, [B, S, M] each, from the state that enters the cycle."""
        if self.normalized:
            state = F.layer_norm(state, state.shape[-1:])
        write, read = self.routers[cycle](state).chunk(2, dim=-1)
        return write.softmax(dim=-1), read.softmax(dim=-1)

    def read(self, read: Tensor, writes: list[Tensor], embedding: Tensor, outputs: list[Tensor]) -> Tensor:
        """Compute the next state, accumulated in float32."""
        device = outputs[-1].device  # in a model spread over devices, tensors may be on different ones
        read = read.to(device)
        state = read[..., :1] * embedding.to(device).float()
        for write, output in zip(writes, outputs, strict=True):
            state = state + (read * write.to(device)).sum(-1, keepdim=True) * output.to(device).float()
        return state.to(outputs[-1].dtype)


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
}


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
        elif isinstance(module, Float32Router):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.copy_(module.bias, torch.tensor(module.initial_bias))
        elif isinstance(module, Recurrence):
            module.initialize()


class MeshModel(MeshPreTrainedModel):
    """Embedding, prelude, looped core, coda, final norm.

    With ``output_hidden_states`` the output has ``loop_states``, K + 3 tensors [B, S, D]: h_emb, the state that enters
    loop 0, ..., the state that enters loop K-1, the state that enters the coda, the coda's output before the final
    norm. (For mesh the first K + 2 are s_0 .. s_{K+1}; for the others h_emb, h(0) .. h(K).)
    """

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        loops = 1 if config.share_core else config.num_loops
        self.embed_in: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.prelude = nn.ModuleList(MeshLayer(config) for _ in range(config.num_prelude_layers))
        self.core = nn.ModuleList(MeshLayer(config) for _ in range(config.num_core_layers * loops))
        self.coda = nn.ModuleList(MeshLayer(config) for _ in range(config.num_coda_layers))
        self.attentions = nn.ModuleList(ComputedAttention(config, index) for index in range(config.num_computed_layers))
        self.recurrence = RECURRENCES[config.recurrence](config)
        self.final_layer_norm = make_norm(config)
        self.rotary = MeshRotary(config)
        self.embedding_scale = config.hidden_size**0.5 if config.embedding_scaling else 1.0
        self.gradient_checkpointing = False
        self.post_init()

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
        **kwargs,
    ) -> MeshModelOutput:
        """``inputs_embeds`` are rows of the embedding [B, S, D], before their scaling by sqrt(D). ``cache`` is
        ``past_key_values``, by its name since transformers 5.24."""
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
        kept = past_key_values.layers if past_key_values is not None and self.config.keeps_last_loop_only else []
        if any(not isinstance(layer, DynamicLayer) for layer in kept):
            raise ValueError('kv_cache_loops="last" needs a dynamic cache: drop cache_implementation')
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
        states = self.recurrence(
            self.dropout(inputs_embeds * self.embedding_scale),
            prelude=lambda state: self.run_layers(self.prelude, state, 0, **inputs),
            core=lambda loop, state: self.run_core(loop, state, **inputs),
        )
        first_coda_entry = self.config.num_hidden_layers - self.config.num_coda_layers
        output = self.run_layers(self.coda, states[-1], first_coda_entry, **inputs)
        return MeshModelOutput(
            last_hidden_state=self.final_layer_norm(output),
            **named_cache,
            loop_states=(*states, output) if self.wants_states(kwargs) else None,
        )

    def run_core(self, loop: int, state: Tensor, **inputs) -> Tensor:
        """Run f_core in loop ``loop``; each loop has its own cache entries unless only the last loop's are kept."""
        config, depth = self.config, self.config.num_core_layers
        layers = self.core if config.share_core else list(self.core)[loop * depth : (loop + 1) * depth]
        if not config.keeps_last_loop_only:
            return self.run_layers(layers, state, config.num_prelude_layers + loop * depth, **inputs)
        last = loop == config.num_loops - 1
        return self.run_layers(layers, state, config.num_prelude_layers, keep_cache=last, **inputs)

    def run_layers(self, layers, state: Tensor, first_entry: int, keep_cache: bool = True, **inputs) -> Tensor:
        """Run ``layers`` in sequence, with key-value cache entries from ``first_entry`` on."""
        for offset, layer in enumerate(layers):
            state = layer(state, computed=self.attentions[first_entry + offset], keep_cache=keep_cache, **inputs)
        return state

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
