"""Complete training passes: mesh against base, a plain Megatron-Core ``GPTModel`` and transformers' ``GPTNeoX``.

    python benchmarks/end_to_end.py                                      # small, on a CPU
    python benchmarks/end_to_end.py --preset pythia-410m --bf16 \\
        --micro-batch-size 4 --matrix-size 8192                          # full, on a GPU

All compute the same number of layers of the same width and vocabulary, forward and backward on random tokens, the loss
included and the optimizer not. Only mesh and base share their core between loops. They take turns in one process, and
a matrix product of this dtype with them: its best rate is the *peak* that shares are of. A column */ X* is a model's
speed by that of X, the median over rounds of X's time by the model's in the same round. TFLOP/s counts each model's
products by the one formula of ``mesh_megatron/planning/flops.py``. On a CPU, time is the process's own CPU time over
all its threads: run it with one (``OMP_NUM_THREADS=1``).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from recurrence import interleaved, show, surroundings
from torch import Tensor

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.presets import PRESETS

PLAIN, TRANSFORMERS = "GPTModel", "transformers"
ENGINE = "mesh, Transformer Engine"  # where it imports, beside layers of torch


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tokens a second and share of the matrix peak, side by side."""

    preset: str | None = None
    """A model of Table 1 instead of the sizes below."""
    layout: str = "1+2R2+1"
    """Layers of mesh and base; the others have its computed depth."""
    hidden_size: int = 512
    """Width D."""
    num_attention_heads: int = 8
    """Attention heads."""
    seq_length: int = 256
    """Tokens in a sequence."""
    padded_vocab_size: int = 8192
    """Rows of the embedding."""
    micro_batch_size: int = 2
    """Sequences in a pass."""
    rounds: int = 9
    """Rounds that count; two go before them."""
    bf16: bool = False
    """bfloat16 weights and activations; default float32."""
    matrix_size: int = 1024
    """Rows and columns of the matrices whose product is the peak; 8192 suits a GPU."""
    json: Path | None = None
    """Where to write all numbers, with command and versions."""


def main() -> int:
    from mesh_megatron.config import cli
    from mesh_megatron.config.run import RunConfig
    from mesh_megatron.parallel.groups import start_model_parallel
    from mesh_megatron.platform import device

    args = cli.parse(Arguments, description=__doc__)
    device.start_process_group()
    start_model_parallel(RunConfig())
    model, record = mesh_model(args), surroundings()
    passes, notes = contestants(model, args)
    seconds = interleaved({**passes, "matrix product": matrix_product(args)}, args.rounds)
    peak = 2 * args.matrix_size**3 / min(seconds.pop("matrix product")) / 1e12
    record |= {"notes": notes, "matrix peak TFLOP/s": peak, "rows": table(seconds, model, args, peak)}
    if device.has_gpu():  # above 0, memory ran short and the times are too long
        record["allocations repeated"] = torch.cuda.memory_stats()["num_alloc_retries"]
    print(f"{model.layout}, hidden {model.hidden_size}, {record['device']}, matrix product {peak:.4g} TFLOP/s")
    for name, note in notes.items():
        print(f"{name}: {note}")
    show(record["rows"])
    torch.distributed.destroy_process_group()
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def mesh_model(args: Arguments) -> ModelConfig:
    if args.preset is not None:
        return ModelConfig(**PRESETS[args.preset])
    names = ("layout", "hidden_size", "num_attention_heads", "seq_length", "padded_vocab_size")
    return ModelConfig(**{name: getattr(args, name) for name in names})


def contestants(model: ModelConfig, args: Arguments) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """A training pass of each model, on the same tokens, and what a reader should know of two of them."""
    from recurrence import training_pass

    from mesh_megatron.platform import device

    shape = (args.micro_batch_size, model.seq_length)
    tokens = torch.randint(model.padded_vocabulary(None), shape, device=device.device())
    plain, layers = gpt_model(model, tokens, args.bf16)
    transformers, attention = gpt_neox(model, tokens, args.bf16)
    passes = {
        "mesh": training_pass(model, args, "local"),
        "base": training_pass(replace(model, recurrence="base"), args, "local"),
        PLAIN: plain,
        TRANSFORMERS: transformers,
    }
    if layers == "transformer_engine":
        passes[ENGINE] = training_pass(model, args, layers)
    return passes, {PLAIN: f"layers from {layers}", TRANSFORMERS: f"attention {attention}"}


def gpt_model(model: ModelConfig, tokens: Tensor, bf16: bool) -> tuple[Callable[[], Any], str]:
    """Megatron-Core's own model with its own layers, one residual after the other; and where its layers come from."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.utils import init_method_normal

    from mesh_megatron.model.attention import ScaledDotProductAttention
    from mesh_megatron.model.transformer_config import transformer_config
    from mesh_megatron.parallel.build_model import (
        has_gradient_extension,
        transformer_engine_imports,
        use_fused_parts,
    )
    from mesh_megatron.platform import device

    config = transformer_config(model, precision="bf16" if bf16 else "fp32")
    config.use_cpu_initialization = not device.has_gpu()  # the CPU has no second random state to keep apart
    initial = init_method_normal(model.init_method_std)
    config.init_method = config.output_layer_init_method = config.embedding_init_method = initial
    layers = "transformer_engine" if device.has_gpu() and transformer_engine_imports() else "local"
    use_fused_parts(config, layers)
    config.gradient_accumulation_fusion = has_gradient_extension()  # its output layer is always Megatron-Core's own
    spec = get_gpt_layer_local_spec() if layers == "local" else get_gpt_layer_with_transformer_engine_spec()
    if layers == "local" and device.has_gpu():  # Megatron-Core's own would keep S x S numbers a head and layer
        spec.submodules.self_attention.submodules.core_attention = ScaledDotProductAttention
    plain = GPTModel(
        config, spec, model.padded_vocabulary(None), model.seq_length,
        position_embedding_type="rope", rotary_percent=model.rotary_percent,
    ).to(device.device(), config.params_dtype)  # fmt: skip
    for module in plain.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # Transformer Engine's layers add gradients as mesh's and base's do
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), plain)
    positions = torch.arange(model.seq_length, device=tokens.device).expand_as(tokens)

    def forward_backward() -> None:
        chunk.zero_grad_buffer()
        chunk(tokens, positions, None, labels=tokens).mean().backward()

    return forward_backward, layers


def gpt_neox(model: ModelConfig, tokens: Tensor, bf16: bool) -> tuple[Callable[[], Any], str]:
    """The same model in transformers, and its attention: flash-attention where it is installed, else torch's SDPA."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    from transformers.utils import is_flash_attn_2_available

    attention = "flash_attention_2" if bf16 and is_flash_attn_2_available() else "sdpa"
    config = GPTNeoXConfig(
        vocab_size=model.padded_vocabulary(None), hidden_size=model.hidden_size, intermediate_size=model.ffn_size,
        num_hidden_layers=model.segments.computed_layers, num_attention_heads=model.num_attention_heads,
        max_position_embeddings=model.seq_length, rotary_pct=model.rotary_percent, use_cache=False,
        attn_implementation=attention,
    )  # fmt: skip
    with tokens.device:  # draws there too
        neox = GPTNeoXForCausalLM(config).to(dtype=torch.bfloat16 if bf16 else torch.float32).train()

    def forward_backward() -> None:
        neox.zero_grad(set_to_none=True)
        neox(input_ids=tokens, labels=tokens).loss.backward()

    return forward_backward, attention


def matrix_product(args: Arguments) -> Callable[[], Tensor]:
    from mesh_megatron.platform import device

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    shape = (args.matrix_size, args.matrix_size)
    left, right = (torch.randn(shape, dtype=dtype, device=device.device()) for _ in range(2))
    return lambda: left @ right


def table(
    seconds: dict[str, list[float]], model: ModelConfig, args: Arguments, peak: float
) -> dict[str, dict[str, float]]:
    """A row of numbers for every model, from its seconds in each round; ``peak`` in TFLOP/s."""
    from mesh_megatron.planning.flops import training_flops_per_token

    tokens, vocabulary = args.micro_batch_size * model.seq_length, model.padded_vocabulary(None)
    base = replace(model, recurrence="base")
    rows = {}
    for name, times in seconds.items():
        flops = training_flops_per_token(model if name in ("mesh", ENGINE) else base, vocabulary).total
        rate = tokens / statistics.median(times)
        rows[name] = {"tokens/s": rate, "TFLOP/s": rate * flops / 1e12, "share of peak": rate * flops / 1e12 / peak}
        for other in ("base", PLAIN, TRANSFORMERS):
            pairs = zip(seconds[other], times, strict=True)
            rows[name][f"/ {other}"] = statistics.median(theirs / own for theirs, own in pairs)
    return rows


if __name__ == "__main__":
    from mesh_megatron.platform import device

    device.prepare()
    sys.exit(main())
