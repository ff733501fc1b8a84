"""The head's loss, forward and backward: in chunks of several sizes, whole, and as Megatron-Core and torch have it.

    python benchmarks/loss.py                                                    # small, on a CPU
    python benchmarks/loss.py --tokens 16384 --hidden-size 1024 \\
        --padded-vocab-size 52352 --chunks 2048 4096 8192 --bf16                 # full, on a GPU

All take turns in one process. *Peak* is the most that was allocated at once, on top of state, weight and labels.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from recurrence import allocated, interleaved, show, surroundings
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time and peak memory of the output layer and its loss."""

    tokens: int = 512
    """Tokens T."""
    hidden_size: int = 512
    """Width D."""
    padded_vocab_size: int = 8192
    """Rows V of the vocabulary."""
    chunks: tuple[int, ...] = (64, 128, 256, 512)
    """Values of --loss-chunk-tokens to measure."""
    rounds: int = 15
    """Rounds that count; two go before them."""
    bf16: bool = False
    """bfloat16 state and weight; default float32."""
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
    runs = {name: functools.partial(once, loss, *inputs(args)) for name, loss in losses(args).items()}
    seconds = interleaved(runs, args.rounds)
    rows = {
        name: {"ms": 1e3 * statistics.median(seconds[name]), "peak MB": peak(run) / 1e6} for name, run in runs.items()
    }
    record = surroundings() | {"rows": rows}
    print(f"T = {args.tokens}, D = {args.hidden_size}, V = {args.padded_vocab_size}, {record['device']}")
    show(rows)
    torch.distributed.destroy_process_group()
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def inputs(args: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """State [T, D], weight [V, D], labels [T]."""
    from mesh_megatron.platform import device

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    state = torch.randn(args.tokens, args.hidden_size, dtype=dtype, device=device.device())
    weight = torch.randn(args.padded_vocab_size, args.hidden_size, dtype=dtype, device=device.device()) * 0.02
    labels = torch.randint(args.padded_vocab_size, (args.tokens,), device=device.device())
    return state.requires_grad_(), weight.requires_grad_(), labels


def once(loss: Callable[[Tensor, Tensor, Tensor], Tensor], state: Tensor, weight: Tensor, labels: Tensor) -> None:
    state.grad = weight.grad = None
    loss(state, weight, labels).backward()


def peak(run: functools.partial) -> int:
    """Most bytes of a pass, its gradients included."""
    _, state, weight, _ = run.args
    state.grad = weight.grad = None
    return allocated(run)


def losses(args: Arguments) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """By name, summed losses from state, weight and labels."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from mesh_megatron.model.cross_entropy import resolve_loss_kernel, summed_cross_entropy
    from mesh_megatron.platform import device

    kernel = resolve_loss_kernel("auto", device.device())
    weights = torch.ones(args.tokens, device=device.device())

    def chunked(chunk: int, state: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        group = torch.distributed.group.WORLD
        return summed_cross_entropy(state, weight, labels, weights, group=group, chunk_tokens=chunk, kernel=kernel)[0]

    def megatron(state: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy((state @ weight.T).unsqueeze(1), labels.unsqueeze(1)).sum()

    def whole(state: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(state, weight), labels, reduction="sum")

    table = {f"chunks {chunk}": functools.partial(chunked, chunk) for chunk in args.chunks}
    table |= {"Megatron-Core": megatron, "torch": whole}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        table["torch linear"] = functools.partial(F.linear_cross_entropy, reduction="sum", options=options)
    return table


if __name__ == "__main__":
    from mesh_megatron.platform import device

    device.prepare()
    sys.exit(main())
