"""Recursive (looped) transformers with MeSH or additive state passing, in plain PyTorch and transformers.

This file travels with exported weights and is also a second specification of the model: it follows
"MeSH: Memory-as-State-Highways for Recursive Transformers" (arXiv 2510.07739) section by section.

Shapes: B batch, S positions of this call, D hidden size, H heads, G key-value heads, N head width, M memory slots.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mesh import MeshConfig


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
        self.size = int(config.head_dim * config.rotary_percent)
        self.base = config.rotary_base

    def forward(self, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        steps = torch.arange(0, self.size, 2, dtype=torch.float32, device=positions_BS.device)
        angles = positions_BS[..., None].float() * (1.0 / self.base ** (steps / self.size))
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


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


class OutputProjection(nn.Linear):
    """A linear layer into the residual stream, with smaller initial weights than the others (Appendix B)."""


class MeshAttention(nn.Module):
    """Causal attention. ``query_key_value`` holds, for each key-value head, its query heads, its key, its value."""

    def __init__(self, config: MeshConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.q_layernorm = make_norm(config, config.head_dim) if config.qk_layernorm else nn.Identity()
        self.k_layernorm = make_norm(config, config.head_dim) if config.qk_layernorm else nn.Identity()
        self.query_key_value = nn.Linear(config.hidden_size, heads * config.head_dim, bias=config.linear_bias)
        self.dense = OutputProjection(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=config.linear_bias
        )

    def forward(self, x_BSD, attention_mask, rotary, past_key_values, cache_entry, keep_cache, **kwargs):
        batch, length, _ = x_BSD.shape
        per_group = self.num_key_value_groups + 2
        qkv = self.query_key_value(x_BSD).view(batch, length, -1, per_group, self.head_dim)
        query = qkv[..., :-2, :].flatten(2, 3).transpose(1, 2)  # [B, H, S, N]
        key, value = qkv[..., -2, :].transpose(1, 2), qkv[..., -1, :].transpose(1, 2)  # [B, G, S, N]
        query, key = rotate(self.q_layernorm(query), *rotary), rotate(self.k_layernorm(key), *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, cache_entry)
            if not keep_cache:
                past_key_values.layers[cache_entry].crop(-length)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.dense(out.reshape(batch, length, -1)), weights


class MeshMLP(nn.Module):
    """Feed-forward: exact GELU, or SwiGLU with the gate's rows before the others in ``dense_h_to_4h``."""

    def __init__(self, config: MeshConfig):
        super().__init__()
        self.swiglu = config.swiglu
        rows = config.intermediate_size * (2 if config.swiglu else 1)
        self.dense_h_to_4h = nn.Linear(config.hidden_size, rows, bias=config.linear_bias)
        self.dense_4h_to_h = OutputProjection(config.intermediate_size, config.hidden_size, bias=config.linear_bias)

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

    def forward(self, x_BSD: Tensor, **attention_inputs) -> Tensor:
        attended = self.attention(self.input_layernorm(x_BSD), **attention_inputs)[0]
        if self.parallel_residual:
            return x_BSD + attended + self.mlp(self.post_attention_layernorm(x_BSD))
        x_BSD = x_BSD + attended
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 in any precision and under autocast, for the weights of states."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        with torch.autocast(x_BSD.device.type, enabled=False):
            return F.linear(x_BSD.float(), self.weight.float(), self.bias.float())


class CoefficientRouter(Float32Linear):
    """Coefficients a1, a2, a3 per token for `dynamic`; its initial bias is 1, 0, 0."""


class AdditiveRecurrence(nn.Module):
    """h(0) = f_pre(h_emb); h(t+1) is a sum of f_core(h(t)), h(t), h(0) and h_emb (Section 3.1, Appendix E).

    `static` and `dynamic` weight f_core(h(t)), h(0) and h_emb by a1, a2, a3: trained scalars, or a linear function of
    the state that enters the core.
    """

    def __init__(self, config: MeshConfig):
        super().__init__()
        self.loops = config.num_loops
        self.terms = config.recurrence.split("+")
        if "static" in self.terms:
            self.coefficients = nn.Parameter(torch.ones(3))
        if "dynamic" in self.terms:
            self.router = CoefficientRouter(config.hidden_size, 3)

    def forward(self, embedding: Tensor, prelude: Callable, core: Callable) -> list[Tensor]:
        first = state = prelude(embedding)
        states = [embedding, first]
        for loop in range(self.loops):
            state = self.next_state(core(loop, state), state, first, embedding)
            states.append(state)
        return states

    def next_state(self, output: Tensor, state: Tensor, first: Tensor, embedding: Tensor) -> Tensor:
        """Compute the state after a loop whose block mapped ``state`` to ``output``."""
        # In a model spread over devices, tensors may be on different ones: sum on the device of the newest.
        state, first, embedding = (x.to(output.device) for x in (state, first, embedding))
        if "static" in self.terms or "dynamic" in self.terms:
            if "static" in self.terms:
                a1, a2, a3 = self.coefficients.float().to(output.device)
            else:
                a1, a2, a3 = self.router(state).to(output.device).unsqueeze(-2).unbind(-1)
            return (a1 * output.float() + a2 * first.float() + a3 * embedding.float()).to(output.dtype)
        if "residual" in self.terms:
            output = output + state
        if "anchor" in self.terms:
            output = output + first
        if "anchor_emb" in self.terms:
            output = output + embedding
        return output


class MeshRecurrence(nn.Module):
    """State passing through a memory of M slots, one write and one read per cycle (Section 3.2).

    With m_0 = h_emb and the other slots empty, cycle c writes w_b * y_c to every slot b and reads the next state as
    sum_b r_b * m_b. Slots are linear combinations of h_emb and y, so they are never stored:

        s_{c+1} = r_0 * h_emb + sum_{i <= c} <r, w_i> * y_i
    """

    def __init__(self, config: MeshConfig):
        super().__init__()
        self.normalized = config.router_input == "normalized"
        self.routers = nn.ModuleList(
            Float32Linear(config.hidden_size, 2 * config.num_memory_slots) for _ in range(config.num_loops + 1)
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


class MeshPreTrainedModel(PreTrainedModel):
    config: MeshConfig
    config_class = MeshConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MeshLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["recurrence"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MeshLayer, "attentions": MeshAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights from N(0, ``initializer_range``), output projections divided by sqrt(2 N_compute) (Appendix B).

        Biases are zero; coefficients make the initial recurrence `base`.
        """
        super()._init_weights(module)
        if isinstance(module, OutputProjection):
            depth = self.config.num_computed_layers
            init.normal_(module.weight, std=self.config.initializer_range / (2 * depth) ** 0.5)
        elif isinstance(module, AdditiveRecurrence) and "static" in module.terms:
            init.copy_(module.coefficients, torch.tensor([1.0, 0.0, 0.0]))
        elif isinstance(module, CoefficientRouter):
            init.copy_(module.bias, torch.tensor([1.0, 0.0, 0.0]))


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
        self.prelude = nn.ModuleList(MeshLayer(config) for _ in range(config.num_prelude_layers))
        self.core = nn.ModuleList(MeshLayer(config) for _ in range(config.num_core_layers * loops))
        self.coda = nn.ModuleList(MeshLayer(config) for _ in range(config.num_coda_layers))
        self.recurrence = (MeshRecurrence if config.recurrence == "mesh" else AdditiveRecurrence)(config)
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
        **kwargs,
    ) -> MeshModelOutput:
        """``inputs_embeds`` are rows of the embedding [B, S, D], before their scaling by sqrt(D)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_in(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        kept = past_key_values.layers if past_key_values is not None and self.config.keeps_last_loop_only else []
        if any(not isinstance(layer, DynamicLayer) for layer in kept):
            raise ValueError('kv_cache_loops="last" needs a dynamic cache: drop cache_implementation')
        if position_ids is None:
            position_ids = self.positions(inputs_embeds, attention_mask, past_key_values)
        inputs = {
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            ),
            "rotary": self.rotary(position_ids, inputs_embeds.dtype),
            "past_key_values": past_key_values,
            **kwargs,
        }
        states = self.recurrence(
            inputs_embeds * self.embedding_scale,
            prelude=lambda state: self.run_layers(self.prelude, state, 0, **inputs),
            core=lambda loop, state: self.run_core(loop, state, **inputs),
        )
        first_coda_entry = self.config.num_hidden_layers - self.config.num_coda_layers
        output = self.run_layers(self.coda, states[-1], first_coda_entry, **inputs)
        return MeshModelOutput(
            last_hidden_state=self.final_layer_norm(output),
            past_key_values=past_key_values,
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
            state = layer(state, cache_entry=first_entry + offset, keep_cache=keep_cache, **inputs)
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
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            loop_states=outputs.loop_states,
        )


__all__ = ["MeshForCausalLM", "MeshModel", "MeshPreTrainedModel"]
