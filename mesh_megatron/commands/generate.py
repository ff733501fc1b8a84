"""Generate text with a checkpoint or an exported model. See docs/huggingface.md."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from mesh_megatron.config.bounds import Bounds, Count

if TYPE_CHECKING:
    from mesh_megatron.hf.loading import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt with a training checkpoint or an exported model, streaming to the terminal."""

    load: Path
    """An exported model, or the folder that a run's --save named, or one checkpoint in it."""
    prompt: str = "-"
    """Text to continue; - reads standard input."""
    interactive: bool = False
    """Ask for one line after another; each is continued with all before it in view, and its tokens/s are shown."""
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
    exit_criterion: Literal["change", "kl", "gate"] | None = None
    """Let a token leave the core after a loop that changed it less than --exit-threshold: the relative change of its
    state, or KL between what the state reads out before and after the loop; or (gate) once the probability to have
    left, by the model's exit gate, reaches it. Default: every token runs all loops."""
    exit_threshold: Annotated[float, Bounds(above=0)] | None = None
    """Threshold of --exit-criterion."""
    seed: Annotated[int, Bounds(least=0)] | None = None
    """Seed of the sampling; default a new one each time."""


def main() -> int:
    from mesh_megatron.config.cli import parse, run

    args = parse(Generate)
    return run(lambda: generate(args))


def generate(args: Generate) -> None:
    """Stream the prompt and its continuation, or those of a conversation, to standard output."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from mesh_megatron.data.tokenizers import from_config
    from mesh_megatron.hf.loading import load_model
    from mesh_megatron.platform import device

    check(args)
    disable_progress_bar()  # the terminal is for the text
    dtype = getattr(torch, args.dtype) if args.dtype else None
    loaded = load_model(args.load, args.iteration, dtype, device.device(), from_config, args.tokenizer_model)
    if loaded.tokenizer is None:
        raise ValueError(f"--load {args.load}: the model has no tokenizer, so there is no text to make")
    if args.loops is not None:
        loaded.set_loops(args.loops)
    if (args.exit_criterion, args.exit_threshold) != (None, None):
        loaded.set_exits(args.exit_criterion, args.exit_threshold)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    if args.interactive:
        converse(loaded, args)
    else:
        prompt = token_ids(loaded, sys.stdin.read() if args.prompt == "-" else args.prompt)
        if len(prompt) + args.max_new_tokens > loaded.max_length:
            logger.warning(
                f"--prompt of {len(prompt)} tokens and --max-new-tokens {args.max_new_tokens}: the model's longest "
                f"sequence is {loaded.max_length}; tokens beyond may be predicted badly"
            )
        continue_text(loaded, args, prompt, show_prompt=True)


def check(args: Generate) -> None:
    """Raise ``ValueError`` for settings that exclude each other."""
    if not args.greedy and args.temperature <= 0:
        raise ValueError(f"--temperature {args.temperature}: must be above 0; --greedy takes the likeliest token")
    if args.interactive and args.prompt != "-":
        raise ValueError(f"--prompt {args.prompt}: --interactive asks for prompts; drop one of them")


def token_ids(loaded: LoadedModel, prompt: str) -> list[int]:
    """Return the ids of ``prompt``, or the end of document for an empty one; ``ValueError`` without either."""
    from mesh_megatron.data.tokenizers.library_errors import as_value_error

    with as_value_error("--prompt"):
        ids = loaded.tokenizer(prompt, verbose=False)["input_ids"]  # no warning of lengths
    if not ids and loaded.eod is None:
        raise ValueError("--prompt: is empty, and the tokenizer has no end of document to start from")
    return ids or [loaded.eod]


def line_ids(loaded: LoadedModel, line: str) -> list[int]:
    """Return the ids of ``line`` on a new line after other text: without SentencePiece's space before a first word."""
    text, both = token_ids(loaded, "a"), token_ids(loaded, "a\n" + line)
    return both[len(text) :] if both[: len(text)] == text else token_ids(loaded, "\n" + line)


def continue_text(loaded: LoadedModel, args: Generate, ids: list[int], show_prompt: bool) -> list[int]:
    """Stream a continuation of ``ids`` to standard output and return its ids."""
    import torch

    from mesh_megatron.hf.text_stream import TextStream

    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    prompt = torch.tensor([ids], device=loaded.model.device)
    sequence = loaded.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # transformers would leave out tokens that are also the padding
        max_new_tokens=args.max_new_tokens,
        do_sample=not args.greedy,
        streamer=TextStream(loaded.tokenizer, show_on_terminal, show_prompt),
        **({} if args.greedy else sampling),
    )
    return sequence[0, len(ids) :].tolist()


def show_on_terminal(text: str) -> None:
    print(text, end="", flush=True)


def converse(loaded: LoadedModel, args: Generate) -> None:
    """Continue each line of standard input after all lines and continuations before it.

    Standard error says how fast. The oldest tokens are dropped where the model's longest sequence ends.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys edit the line and bring back earlier ones)
    room = loaded.max_length - args.max_new_tokens
    if room < 1:
        raise ValueError(
            f"--max-new-tokens {args.max_new_tokens}: leaves no room for a prompt in the model's {loaded.max_length} "
            "tokens; make it smaller"
        )
    print("a line to continue; /reset forgets all before; end of input (ctrl-D) leaves", file=sys.stderr)
    history: list[int] = []
    while (line := read_line()) is not None:
        if line == "/reset":
            history = []
            continue
        history = (history + (line_ids(loaded, line) if history else token_ids(loaded, line)))[-room:]
        start = time.perf_counter()
        made = continue_text(loaded, args, history, show_prompt=False)
        seconds = time.perf_counter() - start
        print(f"[{len(made)} tokens, {len(made) / seconds:.1f} tokens/s]", file=sys.stderr)
        history += made


def read_line() -> str | None:
    """Ask for a line; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
