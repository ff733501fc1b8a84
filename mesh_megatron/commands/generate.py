"""Generate text with a checkpoint or an exported model. See docs/huggingface.md."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mesh_megatron.config.bounds import Bounds, Count


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt with a training checkpoint or an exported model, streaming to the terminal."""

    load: Path
    """An exported model, or the folder that a run's --save named, or one checkpoint in it."""
    prompt: str = "-"
    """Text to continue; - reads standard input."""
    iteration: Annotated[int, Bounds(least=0)] | None = None
    """Checkpoint to use; default the newest."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision to compute in; default the stored one."""
    tokenizer_model: Path | None = None
    """Where the tokenizer's model is now, if it has moved since training."""
    max_new_tokens: Count = 128
    """Largest number of tokens to generate."""
    greedy: bool = False
    """Always take the likeliest token instead of sampling."""
    temperature: Annotated[float, Bounds(least=0)] = 1.0
    """Sampling temperature: below 1 sharpens the distribution, above 1 flattens it."""
    top_k: Annotated[int, Bounds(least=0)] = 0
    """Sample from the k likeliest tokens only; 0 for all."""
    top_p: Annotated[float, Bounds(above=0, most=1)] = 1.0
    """Sample from the smallest set of likeliest tokens whose total probability reaches this."""
    loops: Count | None = None
    """Number of times that the shared core runs; default as in training."""
    seed: Annotated[int, Bounds(least=0)] | None = None
    """Seed of the sampling; default a new one each time."""


def main() -> int:
    from mesh_megatron.config.cli import parse, run

    args = parse(Generate)
    return run(lambda: generate(args))


def generate(args: Generate) -> None:
    """Stream the prompt and its continuation to standard output."""
    import torch
    from transformers import TextStreamer
    from transformers.utils.logging import disable_progress_bar

    from mesh_megatron.data.tokenizers import from_config
    from mesh_megatron.data.tokenizers.library_errors import as_value_error
    from mesh_megatron.hf.loading import load_model
    from mesh_megatron.platform import device

    if not args.greedy and args.temperature <= 0:
        raise ValueError(f"--temperature {args.temperature}: must be above 0; --greedy takes the likeliest token")
    disable_progress_bar()  # the terminal is for the text
    dtype = getattr(torch, args.dtype) if args.dtype else None
    loaded = load_model(args.load, args.iteration, dtype, device.device(), from_config, args.tokenizer_model)
    if loaded.tokenizer is None:
        raise ValueError(f"--load {args.load}: the model has no tokenizer, so there is no text to make")
    if args.loops is not None:
        loaded.set_loops(args.loops)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with as_value_error("--prompt"):
        ids = loaded.tokenizer(prompt)["input_ids"] or [loaded.eod]
    if ids == [None]:
        raise ValueError("--prompt: is empty, and the tokenizer has no end of document to start from")
    if args.seed is not None:
        torch.manual_seed(args.seed)
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    loaded.model.generate(
        torch.tensor([ids], device=loaded.model.device),
        max_new_tokens=args.max_new_tokens,
        do_sample=not args.greedy,
        streamer=TextStreamer(loaded.tokenizer, skip_special_tokens=True),
        **({} if args.greedy else sampling),
    )
