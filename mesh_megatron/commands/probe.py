"""Probe hidden states and routers of models, with numbers and figures. See docs/probes.md."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mesh_megatron.config.bounds import Bounds, Count


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Probe checkpoints and exported models side by side: update magnitudes, CKA, singular values, routers, the loss
    after each loop. Writes probe.json and figures."""

    load: tuple[Path, ...]
    """Exported models, folders that a run's --save named, or single checkpoints in them."""
    data_path: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--data",))]
    """Prefixes of .bin/.idx pairs, or text files; samples are spread evenly over all of them."""
    output: Path
    """Folder to write."""
    samples: Count = 500
    """Windows of tokens to take; fewer if the data has fewer."""
    seq_length: Annotated[int, Bounds(least=2)] | None = None
    """Tokens per window; default the longest that every model was made for."""
    names: tuple[str, ...] = ()
    """Names of the models in figures; default their folders' names."""
    iteration: Annotated[int, Bounds(least=0)] | None = None
    """Checkpoint to probe; default the newest."""
    tokenizer_model: Path | None = None
    """Where the tokenizer's model is now, if it has moved since training."""
    plain_layout: str | None = None
    """Blocks that plain models are seen in, such as 4+8+8+4; default how a checkpoint was trained, two halves for
    other models."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision to compute in; default the stored one."""
    tokens: Count = 50
    """Most frequent tokens to list router weights for."""
    exit_criterion: Literal["change", "kl", "gate"] | None = None
    """Also let tokens leave the core of recursive models early, as docs/loops.md describes, at --exit-thresholds."""
    exit_thresholds: tuple[Annotated[float, Bounds(above=0)], ...] = ()
    """Thresholds of --exit-criterion to compare."""
    force: bool = False
    """Replace an existing output."""


def main() -> int:
    from mesh_megatron.config.cli import parse, run

    args = parse(Arguments)
    return run(lambda: report(args))


def report(args: Arguments) -> None:
    """Probe the models and print one line for each."""
    for name, numbers in probe(args)["models"].items():
        print(summary(name, numbers))
    print(f"wrote {args.output}")


def probe(args: Arguments) -> dict[str, Any]:
    """Write the output folder and return the report, as in its probe.json."""
    from mesh_megatron.analysis.probe_figures import draw_figures
    from mesh_megatron.config.layout import Layout
    from mesh_megatron.hf.loading import read_model_config
    from mesh_megatron.hf.token_streams import read_stream
    from mesh_megatron.util.staged_folder import check_output, staged_folder

    if (args.exit_criterion is None) != (not args.exit_thresholds):
        raise ValueError("--exit-criterion and --exit-thresholds belong together: give both or neither")
    check_output(args.output, args.force, mark="probe.json")
    names = model_names(args)
    plain_layout = Layout.parse(args.plain_layout) if args.plain_layout else None
    configs = [read_model_config(folder, args.iteration) for folder in args.load]
    longest = min(config.seq_length for config in configs)
    length = longest if args.seq_length is None else args.seq_length
    if length > longest:
        raise ValueError(f"--seq-length {length}: one of the models was made for {longest} tokens; use at most that")
    streams = {path: read_stream(path) for path in args.data_path}
    report: dict[str, Any] = {"data": list(args.data_path), "seq_length": length, "models": {}}
    for name, folder, config in zip(names, args.load, configs, strict=True):
        numbers = probe_model(args, name, folder, plain_layout or config.segments, streams, length)
        report["models"][name] = {"load": str(folder), "recurrence": config.recurrence, **numbers}
    with staged_folder(args.output, args.force, mark="probe.json") as staging:
        (staging / "probe.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        draw_figures(report["models"], staging)
    return report


def probe_model(
    args: Arguments, name: str, folder: Path, layout: Any, streams: dict[str, Any], length: int
) -> dict[str, Any]:
    """Return the numbers of one model, which is loaded only for this call."""
    import torch
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    from mesh_megatron.analysis.exits import ExitProbe
    from mesh_megatron.analysis.probe import Probe, sample_windows
    from mesh_megatron.analysis.trace import build_tracer
    from mesh_megatron.data.tokenizers import from_config
    from mesh_megatron.hf.loading import load_model
    from mesh_megatron.hf.token_streams import token_ids
    from mesh_megatron.platform import device

    disable_progress_bar()  # the one of samples is enough
    dtype = getattr(torch, args.dtype) if args.dtype else None
    loaded = load_model(folder, args.iteration, dtype, device.device(), from_config, args.tokenizer_model)
    rows = loaded.model.config.vocab_size
    gathered = Probe(build_tracer(loaded.model, layout), rows)
    windows = sample_windows(
        {path: token_ids(loaded, path, stream) for path, stream in streams.items()}, length, args.samples
    )
    largest = max(int(window.max()) for window in windows)
    if largest >= rows:
        raise ValueError(f"--data-path {' '.join(streams)}: holds token {largest}, {folder} knows {rows}")
    exits = None
    if args.exit_criterion is not None and loaded.trained_loops is not None:  # plain models beside it run as usual
        exits = ExitProbe(loaded, args.exit_criterion, args.exit_thresholds)
    for window in tqdm(windows, desc=name, unit="sample"):
        gathered.add(torch.from_numpy(window))
        if exits is not None:
            exits.add(torch.from_numpy(window))
    numbers = gathered.to_dict(args.tokens, loaded.tokenizer)
    return numbers if exits is None else numbers | {"exits": exits.to_dict()}


def model_names(args: Arguments) -> list[str]:
    """Return one name per model, from --names or its folder."""
    from mesh_megatron.analysis.labels import names_of

    names = list(args.names) or names_of(args.load)
    if len(names) != len(args.load) or len(set(names)) < len(names):
        raise ValueError(f"--names {' '.join(names)}: give each of the {len(args.load)} models its own name")
    return names


def summary(name: str, numbers: dict[str, Any]) -> str:
    updates = zip(numbers["blocks"], numbers["update_magnitude"]["mean"], strict=True)
    losses = " ".join(f"{loss:.4f}" for loss in numbers["loss"]["mean"])
    shown = ", ".join(f"{block} {update:.3f}" for block, update in updates)
    line = f"{name}: {numbers['samples']} samples | loss before and after each loop {losses} | updates {shown}"
    words = "at" if numbers.get("exits", {}).get("criterion") == "gate" else "below"
    for exits in numbers.get("exits", {"thresholds": []})["thresholds"]:
        line += f"\n  exits {words} {exits['threshold']:g}: {exits['loops']:.2f} loops, loss {exits['loss']:.4f}"
    return line
