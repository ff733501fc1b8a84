"""Import a Hugging Face model as a checkpoint to train. See docs/huggingface.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesh_megatron.hf.import_options import ImportOptions


@dataclass(frozen=True, kw_only=True)
class Import(ImportOptions):
    """Import a Hugging Face model (gpt_neox, or an export of export_hf.py) as a checkpoint that trains on any layout of
    ranks. With --layout a plain model becomes a recursive one made from its layers, to be trained on."""

    model: Path
    """Folder with config.json and safetensors."""


def main() -> int:
    from mesh_megatron.config.cli import parse, run

    args = parse(Import)
    return run(lambda: import_model(args))


def import_model(args: Import) -> None:
    """Write the checkpoint and print lines that describe it and how to train it."""
    from mesh_megatron.hf.importing import HubModel, write_import

    args.validate()
    print(write_import(HubModel(args.model), args, tokenizer=args.model))
