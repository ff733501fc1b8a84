"""The two kinds of transformer layers, and the module specs of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    checkpoint,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.model.attention import ScaledDotProductAttention
from mesh_megatron.model.dropout import Masks
from mesh_megatron.model.loop_keys import LoopKeys, SharingSelfAttention, with_queries_alone
from mesh_megatron.model.low_rank import LowRankColumn, LowRankRow, enter_loop, with_low_rank
from mesh_megatron.model.norm import NORMS, NORMS_OF_LOOPS, norm_in_loop
from mesh_megatron.model.rotary import RotarySelfAttention
from mesh_megatron.model.shared_projection import Norms, ProjectionWithBias, SharedProjection, project_together
from mesh_megatron.model.te_linear import AddsItsBias, AddsUpLoops, ReturnsItsSummand, with_mixins
from mesh_megatron.model.transformer_config import MeshTransformerConfig

# Checkpoint names of the norms: Transformer Engine fuses a norm into the linear layer that follows it, and the local
# spec uses the same names, so that both read the same checkpoints.
_NORM_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


_PLACES = {"attention": "attention", "mlp": "feed-forward"}
"""Names of branches in the hash of dropout's masks."""


class PartialRowParallelLinear(RowParallelLinear):
    """A row-parallel linear layer that returns this rank's partial sum; the caller reduces it over ranks."""

    returns_summand = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explicit_expert_comm = True  # tells Megatron-Core that the caller communicates


Branch = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""A branch of a layer: a normed state [S, B, D] to an output and the bias that the caller must add, if any."""


@dataclass(frozen=True)
class LayerPass:
    """Information on the pass for a layer, given as ``attention_bias``, which recomputation hands on unchanged."""

    masks: Masks | None = None
    """The masks of dropout, if any."""
    loop: int = 0
    """The loop of the core that runs."""
    keys: LoopKeys | None = None
    """The first loop's keys and values, in a core whose later loops attend to them."""


class MeshLayer(TransformerLayer):
    """The parts of both kinds of layers: dropout (``dropout.py``), and what selective recomputation computes again.

    ``LayerPass`` comes as ``attention_bias``.
    """

    config: MeshTransformerConfig

    def __init__(
        self, config: MeshTransformerConfig, *args: Any, norm_of_output: type | None = None, **named: Any
    ) -> None:
        """``norm_of_output`` is the norm of what each branch returns, if there is one (``--sandwich-norm``)."""
        super().__init__(config, *args, **named)
        if norm_of_output is not None:
            for name in ("attention_output_layernorm", "mlp_output_layernorm"):
                self.add_module(name, norm_of_output(config, config.hidden_size, config.layernorm_epsilon))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        attention_bias: LayerPass | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Map [S, B, D] to [S, B, D]; the second result is Megatron-Core's cross-attention context, unused."""
        here = attention_bias or LayerPass()
        for branch in (self.self_attention, self.mlp):
            enter_loop(branch, here.loop)
        attend = partial(
            self.self_attention,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            attention_bias=here.masks,
        )
        if isinstance(self.self_attention, SharingSelfAttention):
            self.self_attention.enter_loop(here.keys, here.loop)
        return self.compute(hidden_states, attend, here), None

    def compute(self, state: Tensor, attend: Branch, here: LayerPass) -> Tensor:
        """Return the layer's output [S, B, D]; ``attend`` maps the normed state to attention's output and bias."""
        raise NotImplementedError

    def norms(self) -> Norms:
        """Return what applies the norms of one pass."""
        return Norms(self.training and (self.recompute_input_layernorm or self.recompute_pre_mlp_layernorm))

    def feed_forward(self, normed: Tensor, loop: int) -> tuple[Tensor, Tensor | None]:
        """Return the feed-forward layer's output in ``loop``, and its bias if the caller must add it."""
        if not (self.recompute_mlp and self.training):
            return self.mlp(normed)
        biases: list[Tensor | None] = []  # a parameter must not be an output of the recomputed function

        def run(normed: Tensor) -> Tensor:
            enter_loop(self.mlp, loop)  # another one may have run since
            output, bias = self.mlp(normed)
            biases.append(bias)
            return output

        return checkpoint(run, False, normed), biases[0]

    @property
    def adds_each_branch(self) -> bool:
        """True if something happens to a branch's output before it is added to the state: dropout or a norm."""
        return self.config.hashed_hidden_dropout > 0 or hasattr(self, "mlp_output_layernorm")

    def add(self, state: Tensor, output: tuple[Tensor, Tensor | None], here: LayerPass, branch: str) -> Tensor:
        """Add the output and bias of a ``branch`` (attention or mlp) to the state [S, B, D], after norm and dropout."""
        added, bias = output
        added = added if bias is None else added + bias
        if (norm := getattr(self, f"{branch}_output_layernorm", None)) is not None:
            added = norm_in_loop(norm, here.loop)(added)
        share = self.config.hashed_hidden_dropout
        if here.masks is not None and share:
            added = here.masks.drop(added, _PLACES[branch], self.layer_number - 1, share)
        return state + added


class SequentialLayer(MeshLayer):
    """y = x + attn(ln1(x)), then y + mlp(ln2(y)); with ``--sandwich-norm`` y = x + ln3(attn(ln1(x))), and so on."""

    def compute(self, state: Tensor, attend: Branch, here: LayerPass) -> Tensor:
        norms = self.norms()
        attention = attend(norms(norm_in_loop(self.input_layernorm, here.loop), state))
        state = self.add(state, attention, here, "attention")
        mlp = self.feed_forward(norms(norm_in_loop(self.pre_mlp_layernorm, here.loop), state), here.loop)
        norms.free(attention[0], mlp[0])
        return self.add(state, mlp, here, "mlp")


class ParallelResidualLayer(MeshLayer):
    """x + attn(ln1(x)) + mlp(ln2(x)), the layer of GPT-NeoX (Section 4); both outputs normed with ``--sandwich-norm``.

    If both branches end in a linear layer that returns a partial sum, one collective reduces both over ranks. If both
    begin with a ``SharedProjection``, sequence parallelism gathers their input once.
    """

    def compute(self, state: Tensor, attend: Branch, here: LayerPass) -> Tensor:
        norms = self.norms()
        both = tuple(norm_in_loop(norm, here.loop) for norm in (self.input_layernorm, self.pre_mlp_layernorm))
        if self.config.sequence_parallel and isinstance(self.self_attention.linear_qkv, SharedProjection):
            linears = self.self_attention.linear_qkv, self.mlp.linear_fc1
            attention_input, mlp_input = project_together(state, both, linears, norms)
        else:
            attention_input, mlp_input = (norms(norm, state) for norm in both)
        attention = attend(attention_input)
        mlp = self.feed_forward(mlp_input, here.loop)
        norms.free(attention[0], mlp[0])
        if self.adds_each_branch:  # ``layer_specs`` chose layers that return no partial sum
            return self.add(self.add(state, attention, here, "attention"), mlp, here, "mlp")
        branches = attention[0] + mlp[0]
        if getattr(self.self_attention.linear_proj, "returns_summand", False):
            branches = self._sum_over_ranks(branches)
        output = state + branches
        if attention[1] is not None:
            output += attention[1] if mlp[1] is None else attention[1] + mlp[1]  # None: experts add their own
        return output

    def _sum_over_ranks(self, summand: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(summand)
        return reduce_from_tensor_model_parallel_region(summand)


def layer_specs(
    config: ModelConfig,
    implementation: str = "local",
    core_attention: type = ScaledDotProductAttention,
    own_attention: bool = False,
) -> dict[str, ModuleSpec]:
    """Build the layer spec of each segment: prelude, core and coda.

    The local implementation uses ``core_attention``; with ``own_attention`` Transformer Engine's layers use it too.
    """

    def parts(joint: bool, in_core: bool = False) -> _Parts:
        if implementation == "local":
            return _local_parts(config, core_attention, joint, in_core)
        return _transformer_engine_parts(config, core_attention if own_attention else None, joint)

    dense = _layer_spec(config, parts(joint=config.joint_branches))
    # Experts have their own communication, so their layer's branches cannot share one.
    joint = config.joint_branches and config.num_experts is None
    of_core = parts(joint, in_core=True)
    if config.per_loop_norms:
        own = NORMS_OF_LOOPS[config.normalization]
        of_core = replace(of_core, norm_of_linear=own, norm_of_output=own)
    if config.share_kv_across_loops:
        of_core = replace(of_core, self_attention=SharingSelfAttention)
    core = _layer_spec(config, of_core, experts=config.num_experts is not None)
    return {"prelude": dense, "core": core, "coda": dense}


@dataclass(frozen=True)
class _Parts:
    """The modules of one implementation."""

    norm: type
    norm_of_linear: type
    """The norm before a linear layer: the identity if the linear layer includes it."""
    norm_of_output: type
    """The norm of what a branch returns."""
    column: type
    """The column-parallel linear layer after a norm."""
    row: type
    attention: type
    dense: ModuleSpec
    experts: ModuleSpec
    self_attention: type = RotarySelfAttention


def _layer_spec(config: ModelConfig, parts: _Parts, experts: bool = False) -> ModuleSpec:
    keys = {} if parts.norm_of_linear is IdentityOp else dict(_NORM_KEYS)
    norm_of_head = parts.norm if config.qk_layernorm else IdentityOp
    if experts:
        keys.pop("pre_mlp_layernorm.", None)  # the norm before experts is a separate module in both specs
    return ModuleSpec(
        module=ParallelResidualLayer if config.parallel_residual else SequentialLayer,
        params={"norm_of_output": parts.norm_of_output} if config.sandwich_norm else {},
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm_of_linear,
            self_attention=ModuleSpec(
                module=parts.self_attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column,
                    core_attention=parts.attention,
                    linear_proj=parts.row,
                    q_layernorm=norm_of_head,
                    k_layernorm=norm_of_head,
                ),
            ),
            pre_mlp_layernorm=parts.norm if experts and parts.norm_of_linear is IdentityOp else parts.norm_of_linear,
            mlp=parts.experts if experts else parts.dense,
            sharded_state_dict_keys_map=keys,
        ),
    )


def _local_parts(config: ModelConfig, core_attention: type, joint: bool, in_core: bool) -> _Parts:
    """Return the modules of torch and Megatron-Core; with ``joint``, both branches share their collectives.

    ``in_core``, linear layers may have a difference of each loop, and that of queries may compute these alone.
    """
    column: type = SharedProjection if joint else ProjectionWithBias
    row: type = PartialRowParallelLinear if joint else RowParallelLinear
    first = column
    if in_core and config.share_kv_across_loops:
        column = with_queries_alone(column)
    if in_core and config.loop_lora_rank is not None:
        first = with_low_rank(first, LowRankColumn, parts=2 if config.swiglu else 1)
        column, row = with_low_rank(column, LowRankColumn), with_low_rank(row, LowRankRow)
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    norm = NORMS[config.normalization]
    return _Parts(
        norm=norm,
        norm_of_linear=norm,
        norm_of_output=norm,
        column=column,
        row=row,
        attention=core_attention,
        dense=ModuleSpec(module=MLP, submodules=replace(linears, linear_fc1=first, linear_fc2=row)),
        experts=_experts(ModuleSpec(module=SequentialMLP, submodules=linears), linears),
    )


def _transformer_engine_parts(config: ModelConfig, core_attention: type | None, joint: bool) -> _Parts:
    """Return the modules of Transformer Engine: its linear layers include the norm, its experts run as grouped GEMM.

    ``core_attention``, if given, replaces its attention; with ``joint``, one collective reduces both branches.
    """
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelGroupedLinear,
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TERowParallelGroupedLinear,
        TERowParallelLinear,
    )
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    column = with_mixins(TELayerNormColumnParallelLinear, AddsUpLoops)
    row = with_mixins(TERowParallelLinear, AddsUpLoops, *([ReturnsItsSummand] if joint else []))
    dense = MLPSubmodules(
        linear_fc1=with_mixins(TELayerNormColumnParallelLinear, AddsUpLoops, AddsItsBias), linear_fc2=row
    )
    grouped = MLPSubmodules(
        linear_fc1=with_mixins(TEColumnParallelGroupedLinear, AddsUpLoops),
        linear_fc2=with_mixins(TERowParallelGroupedLinear, AddsUpLoops),
    )
    shared = MLPSubmodules(
        linear_fc1=with_mixins(TEColumnParallelLinear, AddsUpLoops),
        linear_fc2=with_mixins(TERowParallelLinear, AddsUpLoops),
    )
    return _Parts(
        norm=NORMS[config.normalization],
        norm_of_linear=IdentityOp,
        norm_of_output=NORMS[config.normalization],
        column=column,
        row=row,
        attention=core_attention or TEDotProductAttention,
        dense=ModuleSpec(module=MLP, submodules=dense),
        experts=_experts(ModuleSpec(module=TEGroupedMLP, submodules=grouped), shared),
    )


def _experts(experts: ModuleSpec, shared: MLPSubmodules) -> ModuleSpec:
    """Build the mixture of ``experts`` with its router, in place of a dense feed-forward layer.

    ``shared`` are the linear layers of an expert for all tokens, which Megatron-Core builds if its width is set.
    """
    every = ModuleSpec(module=SharedExpertMLP, submodules=shared)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=every))
