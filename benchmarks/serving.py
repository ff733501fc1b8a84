"""Tokens per second of a looped and a plain model of equal computed depth, in transformers and in vLLM.

    python benchmarks/serving.py                                         # transformers, and vLLM if it is installed
    path/to/vllm/bin/python benchmarks/serving.py --json results.json    # a Python with vLLM and tyro

Both models have random weights, the same width and the same vocabulary: MeSH with a core that is run several times, and
GPT-NeoX with as many layers of its own. Each answers the same prompts greedily with the same number of tokens; the two
take turns, round after round. *looped / plain* is the median over rounds of the plain model's time by the looped one's
in the same round: 1 says that a computed layer costs the same, and 0.5 that it costs twice as much. vLLM runs both
through its Transformers backend. On a CPU, time is the process's own CPU time: run it with one thread
(``OMP_NUM_THREADS=1``).
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from recurrence import interleaved, surroundings
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel
from transformers import __version__ as transformers_version

from mesh_megatron.config.layout import Layout
from mesh_megatron.hf.configuration_mesh import MeshConfig
from mesh_megatron.hf.modeling_mesh import MeshForCausalLM

LOOPED, PLAIN = "looped", "plain"
Answer = Callable[[list[list[int]]], Any]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Generation speed of a looped model against a plain one of equal computed depth."""

    layout: str = "2+4R2+2"
    """Layers of the looped model; the plain one has as many as these compute."""
    recurrence: str = "mesh"
    """Scheme of the looped model; base shows what the loop costs without routers and mixing."""
    hidden_size: int = 256
    """Width D."""
    num_attention_heads: int = 8
    """Attention heads; vLLM on a CPU wants a width of 32 or more for each."""
    vocab_size: int = 4096
    """Rows of the embedding."""
    batches: tuple[int, ...] = (1, 32)
    """Sequences that are generated at the same time."""
    prompt: int = 16
    """Tokens of each prompt."""
    new_tokens: int = 16
    """Tokens generated for each."""
    rounds: int = 5
    """Rounds that count; one goes before them."""
    compiled: bool = False
    """vLLM's compiled mode, which takes minutes to start; default eager."""
    json: Path | None = None
    """Where to write all numbers, with command and versions."""


def main() -> int:
    from mesh_megatron.config import cli

    args = cli.parse(Arguments, description=__doc__)
    record = surroundings() | {"transformers": transformers_version}
    models = {LOOPED: looped_model(args), PLAIN: plain_model(args)}
    record["rows"] = measure("transformers", {name: with_transformers(models[name], args) for name in models}, args)
    if importlib.util.find_spec("vllm"):
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}  # one process, one clock
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        from vllm import __version__ as vllm_version

        record["vllm"] = vllm_version
        with tempfile.TemporaryDirectory() as folder:
            answers = {name: with_vllm(models[name], Path(folder) / name, args) for name in models}
            record["rows"] |= measure("vLLM", answers, args)
    for name, row in record["rows"].items():
        print(f"{name:24}" + "".join(f"{key} {value:8.3g}  " for key, value in row.items()))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def looped_model(args: Arguments) -> PreTrainedModel:
    layout = Layout.parse(args.layout)
    config = MeshConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        recurrence=args.recurrence,
        num_prelude_layers=layout.prelude,
        num_core_layers=layout.core,
        num_loops=layout.loops,
        num_coda_layers=layout.coda,
        max_position_embeddings=args.prompt + args.new_tokens,
    )
    return MeshForCausalLM(config).eval()


def plain_model(args: Arguments) -> PreTrainedModel:
    config = GPTNeoXConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_hidden_layers=Layout.parse(args.layout).computed_layers,
        intermediate_size=4 * args.hidden_size,
        max_position_embeddings=args.prompt + args.new_tokens,
    )
    return GPTNeoXForCausalLM(config).eval()


def with_transformers(model: PreTrainedModel, args: Arguments) -> Answer:
    """Generate greedily with ``generate`` and its dynamic cache."""
    settings = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False}
    return lambda prompts: model.generate(torch.tensor(prompts, device=model.device), pad_token_id=0, **settings)


def with_vllm(model: PreTrainedModel, folder: Path, args: Arguments) -> Answer:
    """Generate greedily with vLLM's Transformers backend, without a tokenizer."""
    from vllm import LLM, SamplingParams

    model.save_pretrained(folder)
    served = LLM(
        str(folder),
        model_impl="transformers",
        trust_remote_code=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        dtype="float32",
        enforce_eager=not args.compiled,
        max_model_len=args.prompt + args.new_tokens,
        max_num_seqs=max(args.batches),
    )
    settings = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True, detokenize=False)
    return lambda prompts: served.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)


def measure(tool: str, answers: dict[str, Answer], args: Arguments) -> dict[str, dict[str, float]]:
    """Return tokens per second of both models, and their ratio, for each batch: "tool, batch n" -> row."""
    rows = {}
    for batch in args.batches:
        prompts = torch.randint(1, args.vocab_size, (batch, args.prompt)).tolist()
        passes = {name: (lambda answer=answer, ids=prompts: answer(ids)) for name, answer in answers.items()}
        seconds = interleaved(passes, args.rounds, warmup=1)
        tokens = batch * args.new_tokens
        rows[f"{tool}, batch {batch}"] = {
            **{f"{name} tokens/s": tokens / statistics.median(times) for name, times in seconds.items()},
            "looped / plain": statistics.median(
                plain / looped for plain, looped in zip(seconds[PLAIN], seconds[LOOPED], strict=True)
            ),
        }
    return rows


if __name__ == "__main__":
    sys.exit(main())
