"""The grid of a study: which models are trained, read from YAML and checked before anything starts.

A *setup* is a size of model and a length of training, a *scheme* a way to pass state, a *cell* one of each with a seed.
Cells of one setup differ in their scheme's settings alone: same data in the same order, same number of tokens, same
computed depth, and the same initial weights wherever two models have a parameter of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mesh_megatron.config import cli
from mesh_megatron.config.run import RunConfig

GRIDS = Path(__file__).parent / "grids"
Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text to train on and the tokenizer that is trained on it."""

    sources: tuple[str, ...] = ("stdlib",)
    """Python's own folders by their sysconfig names (stdlib, purelib), or paths of files and folders."""
    vocabulary: int = 512
    """Pieces of the BPE tokenizer, 256 bytes and special tokens counted."""


@dataclass(frozen=True)
class Cell:
    """One model to train. ``settings`` are the groups of ``pretrain_mesh.py --config``."""

    setup: str
    scheme: str
    seed: int
    settings: Settings = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return f"{self.setup}/{self.scheme}/seed{self.seed}"

    @property
    def iterations(self) -> int:
        """Steps after which the cell is trained."""
        return int(self.settings["training"]["train_iters"])

    def run(self) -> RunConfig:
        """The settings as the trainer reads them; ``ValueError`` for what it would refuse."""
        run = cli.from_dict(RunConfig, self.settings, self.name)
        run.model.validate()
        run.training.validate()
        run.training.validate_batch(1)
        return run


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Lets only the best schemes of one setup go on to other cells: those with the least mean loss over its seeds."""

    setup: str
    best: int
    """Number of schemes that go on."""
    always: tuple[str, ...] = ()
    """Schemes that go on anyway and take no place, such as the reference."""


@dataclass(frozen=True)
class Stage:
    """Cells that may be trained at the same time, after all earlier stages."""

    cells: tuple[Cell, ...]
    gate: Gate | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A complete study; stages and their cells are in the order in which they are trained."""

    name: str
    corpus: Corpus
    reference: str
    """The scheme that the others are compared with, inside each setup and seed."""
    stages: tuple[Stage, ...]
    scaling: tuple[str, ...]
    """Setups that differ in size alone, for the scaling figure."""
    shown: tuple[str, ...]
    """Schemes in the figures of curves and of entropies; empty for all."""

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, whether a gate lets them through or not."""
        return tuple(dict.fromkeys(cell for stage in self.stages for cell in stage.cells))


def read_grid(name: str) -> Grid:
    """The grid of that name under ``grids/``, or of a YAML file; ``ValueError`` says what is wrong in it."""
    path = GRIDS / f"{name}.yaml" if (GRIDS / f"{name}.yaml").exists() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in GRIDS.glob("*.yaml")))
        raise ValueError(f"{name}: no grid of that name ({known}) and no such file")
    content = cli.read_yaml(path)
    known_keys = {"corpus", "reference", "settings", "setups", "schemes", "parts", "scaling", "shown"}
    if unknown := sorted(content.keys() - known_keys):
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known_keys))}")
    if missing := sorted({"settings", "setups", "schemes", "parts"} - content.keys()):
        raise ValueError(f"{path}: {missing[0]!r} is missing")
    grid = Grid(
        name=path.stem,
        corpus=cli.from_dict(Corpus, content.get("corpus", {}), f"{path}: corpus"),
        reference=content.get("reference", "base"),
        stages=_stages(content, path),
        scaling=tuple(content.get("scaling", ())),
        shown=tuple(content.get("shown", ())),
    )
    _check_matched(grid, path)
    return grid


def _stages(content: Mapping[str, Any], path: Path) -> tuple[Stage, ...]:
    """Return the parts as stages: one with a gate by itself, the others together with those before them."""
    stages: list[Stage] = []
    for number, part in enumerate(content["parts"], 1):
        where = f"{path}: part {number}"
        for kind in ("setups", "schemes"):
            if unknown := [name for name in part[kind] if name not in content[kind]]:
                raise ValueError(f"{where} names {unknown[0]!r}, which is not one of its {kind}")
        gate = cli.from_dict(Gate, part["gate"], f"{where}: gate", Gate(setup="", best=1)) if "gate" in part else None
        earlier = {(cell.setup, cell.scheme) for stage in stages for cell in stage.cells}
        if gate and (lacking := [name for name in part["schemes"] if (gate.setup, name) not in earlier]):
            raise ValueError(f"{where}: no earlier part trains {lacking[0]!r} in the setup {gate.setup!r} of its gate")
        cells = _cells_of(part, content)
        if gate is None and stages and stages[-1].gate is None:
            cells = (*stages.pop().cells, *cells)
        stages.append(Stage(tuple(dict.fromkeys(cells)), gate))
    return tuple(stages)


def _cells_of(part: Mapping[str, Any], content: Mapping[str, Any]) -> tuple[Cell, ...]:
    """Return the cells of a part seed by seed: a study that is stopped early has complete comparisons."""
    cells = []
    for seed in part["seeds"]:
        for setup in part["setups"]:
            for scheme in part["schemes"]:
                layers = content["settings"], content["setups"][setup] or {}, content["schemes"][scheme]
                cells.append(Cell(setup, scheme, seed, _merged(*layers, {"training": {"seed": seed}})))
    return tuple(cells)


def _merged(*layers: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Groups of settings, later layers over earlier ones."""
    groups = dict.fromkeys(group for layer in layers for group in layer)
    return {group: {k: v for layer in layers for k, v in layer.get(group, {}).items()} for group in groups}


def _check_matched(grid: Grid, path: Path) -> None:
    """Every cell is one the trainer takes, and all cells of a setup compute equally many layers of equal batches."""
    known: dict[str, dict[str, int | None]] = {}
    for cell in grid.cells:
        if "train_iters" not in cell.settings["training"]:
            raise ValueError(f"{path}: {cell.name} has no train_iters; give it under settings: training")
        run = cell.run()
        compute = {
            "computed layers": run.model.segments.computed_layers,
            "hidden size": run.model.hidden_size,
            "tokens a sequence": run.model.seq_length,
            "sequences a step": run.training.batch_size(1),
            "steps": run.training.train_iters,
        }
        others = known.setdefault(cell.setup, compute)
        for what, count in compute.items():
            if others[what] != count:
                raise ValueError(
                    f"{path}: {cell.name} has {count} {what}, other cells of its setup {others[what]}: compute would "
                    "not be matched"
                )
