"""Export a training checkpoint as a Hugging Face model. See docs/huggingface.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from mesh_megatron.config.bounds import Bounds

if TYPE_CHECKING:
    from mesh_megatron.checkpoint.reader import CheckpointReader


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a training checkpoint as a Hugging Face model: safetensors, configuration, tokenizer, model card. Runs
    in one CPU process without the training flags and holds one shard of weights in memory at a time."""

    load: Path
    """Folder that a run's --save named, or one checkpoint (iter_NNNNNNN) in it."""
    output: Path
    """Folder to write."""
    iteration: Annotated[int, Bounds(least=0)] | None = None
    """Checkpoint to export; default the newest."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the exported weights; default the checkpoint's. Routers and coefficients stay float32."""
    shard_size: Annotated[float, Bounds(above=0)] = 5.0
    """Largest size of a weights file in GB; the export needs about as much memory."""
    tokenizer_model: Path | None = None
    """Where the tokenizer's model is now, if it has moved since training."""
    no_tokenizer: bool = False
    """Export without a tokenizer."""
    license: str = "other"
    """Identifier of the weights' licence on model hubs, for the model card: apache-2.0, mit, cc-by-4.0, ..."""
    force: bool = False
    """Replace an existing export."""


def main() -> int:
    from mesh_megatron.config.cli import parse, run

    args = parse(Export)
    return run(lambda: print(export(args)))


def draw_losses(reader: CheckpointReader, folder: Path) -> None:
    """Draw the run's losses up to the checkpoint for the model card, if the run logged any."""
    from mesh_megatron.analysis.curves import plot_losses, read_curves
    from mesh_megatron.checkpoint.metrics_file import METRICS_FILE
    from mesh_megatron.hf.model_card import LOSS_FIGURE

    metrics, last = reader.folder.parent / METRICS_FILE, reader.resolved.get("iteration")
    if last is not None and metrics.is_file() and read_curves(metrics, last):
        plot_losses({"training": metrics}, folder / LOSS_FIGURE, last)


def export(args: Export) -> str:
    """Write the export and return a line that describes it."""
    import torch

    from mesh_megatron.checkpoint.reader import CheckpointReader
    from mesh_megatron.data.tokenizers import from_config
    from mesh_megatron.hf.export import Exporter
    from mesh_megatron.hf.tokenizer import export_tokenizer
    from mesh_megatron.util.staged_folder import check_output, staged_folder

    check_output(args.output, args.force, mark="config.json")
    reader = CheckpointReader(args.load, args.iteration)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    exporter = Exporter(reader, dtype, shard_bytes=int(args.shard_size * 10**9))
    tokenizer = None
    if not args.no_tokenizer and reader.config.data.tokenizer_type not in (None, "NullTokenizer"):
        tokenizer = from_config(reader.data(args.tokenizer_model))
    with staged_folder(args.output, args.force, mark="config.json") as folder:
        if tokenizer is not None:  # first: it may be refused, and weights may take long
            exporter.config.pad_token_id = export_tokenizer(tokenizer, folder, exporter.config)
        draw_losses(reader, folder)
        exporter.write(folder, args.license)
    kind = exporter.config.model_type + ("" if tokenizer else ", without a tokenizer")
    return f"{args.output}: {kind}, from {reader.folder}"
