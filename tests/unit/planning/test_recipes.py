"""The recipes of Table 1: they parse, are the paper's models, and fit on the GPUs that their README names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mesh_megatron.config import cli
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.hardware import gpu_named
from mesh_megatron.planning.plan import plan_run

FOLDER = Path(__file__).parents[3] / "examples" / "pythia"
README = (FOLDER / "README.md").read_text()
TABLE = {
    name: (layout, schemes.split(", "))
    for name, layout, schemes in re.findall(r"^\| `(\S+\.yaml)` \| (\S+) \| (.+) \|$", README, flags=re.M)
}
RECIPES = [(name, scheme) for name, (_, schemes) in TABLE.items() for scheme in schemes]

# Without embeddings, as published: Pythia's own models, which are the vanilla ones, and Table 5's.
PUBLISHED = {
    ("160m.yaml", "vanilla"): 85_056_000,
    ("410m.yaml", "vanilla"): 302_311_424,
    ("410m-3-loops.yaml", "vanilla"): 302_311_424,
    ("1b.yaml", "vanilla"): 805_736_448,
    ("1.4b.yaml", "vanilla"): 1_208_602_624,
    ("1.4b.yaml", "base"): 805_736_448,
    ("1.4b.yaml", "mesh"): 805_797_918,
}


def recipe(name: str, *flags: str) -> RunConfig:
    return cli.parse_run(RunConfig, PRESETS, ["--config", str(FOLDER / name), *flags], prog="pretrain_mesh.py")


def test_the_readme_lists_every_file():
    assert sorted(TABLE) == sorted(path.name for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name, scheme", RECIPES)
def test_a_recipe_is_the_papers_and_fits(name: str, scheme: str):
    run = recipe(name, "--recurrence", scheme)
    room = gpu_named("h100").memory_gb * 1e9 - 6 * 2**30
    for count in (1, 8, 64):
        plan = plan_run(run, count)
        summary = plan.summary
        assert plan.fullest.total < room, f"{count} GPUs"
        assert summary.tokens_per_step == 512 * 4096
        assert 0 <= 250e9 - summary.total_tokens < summary.tokens_per_step
    assert run.model.layout == TABLE[name][0] and run.training.precision == "bf16"
    published = PUBLISHED.get((name, scheme))
    assert published is None or summary.parameters.non_embedding == published


def test_published_counts_are_of_recipes():
    assert set(PUBLISHED) <= set(RECIPES)


def test_commands_of_the_readme():
    lines = [line for line in README.splitlines() if line.startswith("    ") and "--save" in line]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        flags = words[words.index("--config") :]
        run = cli.parse_run(RunConfig, PRESETS, [flags[0], str(FOLDER / Path(flags[1]).name), *flags[2:]])
        assert run.model.recurrence == "mesh" and run.data.data_path == ("PREFIX",)
        script = next(word for word in words if word.endswith(("pretrain_mesh.py", "pretrain.sh")))
        assert (FOLDER.parents[1] / script).exists()


def test_the_slurm_array_has_every_recipe() -> None:
    script = (FOLDER.parent / "slurm/sizes_array.sbatch").read_text()
    (sizes,) = re.findall(r"^SIZES=\((.*)\)$", script, flags=re.M)
    assert sorted(sizes.split()) == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert f"#SBATCH --array=0-{len(sizes.split()) - 1}\n" in script
