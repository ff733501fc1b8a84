"""Grids: what is trained in which order, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.study.grid import GRIDS, read_grid
from benchmarks.study.plan import describe
from mesh_megatron.config import cli
from mesh_megatron.config.presets import ROUTER_PRESETS
from mesh_megatron.config.run import RunConfig


def content(**changes: Any) -> dict[str, Any]:
    grid = {
        "settings": {"model": {"layout": "1+1R2+1", "seq_length": 32}, "training": {"train_iters": 4, "lr": 1e-3}},
        "setups": {
            "narrow": {"model": {"hidden_size": 16, "num_attention_heads": 1}},
            "fast": {"model": {"hidden_size": 16, "num_attention_heads": 1}, "training": {"lr": 1e-2}},
        },
        "schemes": {
            "base": {"model": {"recurrence": "base"}},
            "mesh": {"model": {"recurrence": "mesh", "num_memory_slots": 3}},
        },
        "parts": [
            {"setups": ["narrow"], "schemes": ["base", "mesh"], "seeds": [1, 2]},
            {"setups": ["narrow", "fast"], "schemes": ["base"], "seeds": [1]},
        ],
    }
    return grid | changes


def write(folder: Path, **changes: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content(**changes)))
    return str(path)


def test_parts_go_seed_by_seed_and_no_cell_comes_twice(tmp_path):
    grid = read_grid(write(tmp_path))
    names = [cell.name for cell in grid.cells]
    narrow = [f"narrow/{scheme}/seed{seed}" for seed in (1, 2) for scheme in ("base", "mesh")]
    assert names == [*narrow, "fast/base/seed1"]
    assert grid.name == "mine" and grid.reference == "base"


def test_parts_with_a_gate_are_stages_of_their_own(tmp_path):
    gate = {"setup": "narrow", "best": 1, "always": ["base"]}
    parts = content()["parts"]
    parts.append({"setups": ["fast"], "schemes": ["base", "mesh"], "seeds": [1, 2], "gate": gate})
    first, second = read_grid(write(tmp_path, parts=parts)).stages
    assert first.gate is None and len(first.cells) == 5
    assert second.gate.best == 1 and second.gate.always == ("base",) and len(second.cells) == 4


def test_a_cell_differs_in_its_setup_scheme_and_seed_alone(tmp_path):
    cells = {cell.name: cell for cell in read_grid(write(tmp_path)).cells}
    mesh, fast = cells["narrow/mesh/seed2"].run(), cells["fast/base/seed1"].run()
    assert (mesh.model.recurrence, mesh.model.num_memory_slots, mesh.model.hidden_size) == ("mesh", 3, 16)
    assert (mesh.training.seed, mesh.training.lr, fast.training.lr) == (2, 1e-3, 1e-2)
    assert cells["narrow/mesh/seed2"].iterations == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": []}, "unknown key 'part'"),
        ({"schemes": {"base": {}}}, "part 1 names 'mesh', which is not one of its schemes"),
        ({"schemes": {"base": {}, "mesh": {"model": {"recurence": "mesh"}}}}, "did you mean 'recurrence'"),
        (
            {"schemes": {"base": {}, "mesh": {"model": {"layout": "1+1R3+1"}}}},
            "has 5 computed layers, other .* 4: compute",
        ),
        (
            {"schemes": {"base": {}, "mesh": {"training": {"train_iters": 5}}}},
            "has 5 steps, other cells of its setup 4",
        ),
        ({"settings": {"model": {"layout": "1+1R2+1"}, "training": {}}}, "has no train_iters"),
        ({"corpus": {"vocab": 5}}, "did you mean 'vocabulary'"),
        (
            {"parts": [{"setups": ["fast"], "schemes": ["mesh"], "seeds": [1], "gate": {"setup": "narrow"}}]},
            "part 1: no earlier part trains 'mesh' in the setup 'narrow' of its gate",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_grid(write(tmp_path, **changes))


def test_an_unknown_grid_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="no grid of that name .*gpu, routers, schemes, small, tiny"):
        read_grid("large")


@pytest.mark.parametrize("name", sorted(path.stem for path in GRIDS.glob("*.yaml")))
def test_shipped_grids_are_whole(name):
    grid = read_grid(name)
    seeds = {setup: {cell.seed for cell in grid.cells if cell.setup == setup} for setup in grid.scaling}
    schemes = {cell.scheme for cell in grid.cells}
    assert grid.reference in schemes and set(grid.shown) <= schemes and all(seeds.values())
    for cell in grid.cells:  # every cell has a reference to be compared with
        assert any((c.setup, c.scheme, c.seed) == (cell.setup, grid.reference, cell.seed) for c in grid.cells)


def test_the_cost_is_the_sum_over_cells(tmp_path):
    grid = read_grid(write(tmp_path, corpus={"vocabulary": 128}))
    *lines, total = describe(grid).splitlines()
    assert [line.split()[:2] for line in lines] == [["narrow", "base"], ["narrow", "mesh"], ["fast", "base"]]
    flops = [float(line.split()[-2]) for line in lines]
    assert total.startswith("5 cells, ") and float(total.split()[2]) == pytest.approx(
        2 * flops[0] + 2 * flops[1] + flops[2], rel=0.01
    )
    assert "on one NVIDIA H200 SXM" in describe(grid, "h200")


@pytest.mark.parametrize("name", ["confirmation", "gpu"])
def test_what_is_recommended_is_what_is_compared(name):
    """A study that trained another form than ``--router-preset recommended`` would say nothing about it."""
    grid = read_grid(name)
    cell = next(cell for cell in grid.cells if cell.scheme == "mesh, recommended")
    base = next(other for other in grid.cells if (other.setup, other.scheme) == (cell.setup, "base")).run()
    preset = cli.from_dict(RunConfig, ROUTER_PRESETS["recommended"], "preset", base)
    ours = cell.run()
    assert dataclasses.replace(preset.model, recurrence="mesh") == ours.model
    assert dataclasses.replace(preset.training, seed=cell.seed) == ours.training
