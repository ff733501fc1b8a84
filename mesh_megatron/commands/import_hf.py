"""Import a Hugging Face model as a checkpoint to train. See docs/huggingface.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mesh_megatron.config.bounds import Count, flag
from mesh_megatron.config.model import Recurrence


@dataclass(frozen=True, kw_only=True)
class Import:
    """Import a Hugging Face model (gpt_neox, or an export of export_hf.py) as a checkpoint that trains on any layout of
    ranks. With --layout a plain model becomes a recursive one made from its layers, to be trained on."""

    model: Path
    """Folder with config.json and safetensors."""
    output: Path
    """Folder to write; give it to pretrain_mesh.py as --load, and model.yaml in it as --config."""
    layout: str | None = None
    """Make it recursive: P+CRK+Q takes prelude and coda from the model's ends and the core from between them."""
    init: Literal["first", "average", "select"] | None = None
    """Core from the first C layers between the ends, from the mean of each C-th, or from C spread evenly, with
    --layout; default average."""
    recurrence: Recurrence | None = None
    """Recurrence scheme, with --layout; default mesh, which starts close to base."""
    num_memory_slots: Count | None = None
    """Memory slots of mesh, with --layout; default K + 3."""
    force: bool = False
    """Replace an existing import."""


def main() -> int:
    from mesh_megatron.config.cli import parse, run

    args = parse(Import)
    return run(lambda: print(import_model(args)))


def import_model(args: Import) -> str:
    """Write the checkpoint and return lines that describe it and how to train it."""
    from mesh_megatron.data.tokenizers import build_tokenizer
    from mesh_megatron.hf.importing import HubModel, Importer, copy_tokenizer
    from mesh_megatron.hf.uptrain import recursive_config
    from mesh_megatron.util.staged_folder import check_output, staged_folder

    if args.layout is None:
        for name in ("init", "recurrence", "num_memory_slots"):
            if (value := getattr(args, name)) is not None:
                raise ValueError(f"{flag(name)} {value} is for --layout, which makes a plain model recursive: add it")
    check_output(args.output, args.force, mark="model.yaml")
    source = HubModel(args.model)
    target = source.model
    if args.layout is not None:
        target = recursive_config(source.model, args.layout, args.recurrence or "mesh", args.num_memory_slots)
    with staged_folder(args.output, args.force, mark="model.yaml") as folder:
        tokenizer = None
        if copy_tokenizer(args.model, folder / "tokenizer"):
            trained = build_tokenizer("HuggingFaceTokenizer", folder / "tokenizer")
            tokenizer = (args.output.absolute() / "tokenizer", trained.vocab_size, trained.eod)
        Importer(source, target, args.init or "average").write(folder, tokenizer)
    command = f"pretrain_mesh.py --config {args.output}/model.yaml --load {args.output} --data-path ..."
    return f"{args.output}: {target.recurrence} {target.layout} from {args.model}\ntrain it: {command}"
