"""Import a GPT checkpoint of Megatron-LM as a checkpoint to train. See docs/training.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mesh_megatron.config.bounds import Bounds
from mesh_megatron.hf.import_options import Given, ImportOptions


@dataclass(frozen=True, kw_only=True)
class Import(Given, ImportOptions):
    """Import the weights of a GPT checkpoint of Megatron-LM (torch_dist) as a checkpoint that trains on any layout of
    ranks. With --layout it becomes a recursive model made from its layers, to be trained on."""

    load: Path
    """Save folder of Megatron-LM, or one checkpoint in it."""
    iteration: Annotated[int | None, Bounds(least=0)] = None
    """Checkpoint of this iteration; default the latest."""


def main() -> int:
    from mesh_megatron.config.cli import parse, run

    args = parse(Import)
    return run(lambda: import_model(args))


def import_model(args: Import) -> None:
    """Write the checkpoint and print lines that describe it and how to train it."""
    from mesh_megatron.hf.importing import write_import
    from mesh_megatron.hf.megatron_model import MegatronModel

    args.validate()
    source = MegatronModel(args.load, args.iteration, args)
    print(write_import(source, args), *(f"note: {note}" for note in source.notes), sep="\n")
