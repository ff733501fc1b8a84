"""The rank and the number of ranks that the environment names."""

import os

import pytest

from mesh_megatron.commands.pretrain import main
from mesh_megatron.platform.launcher import place_in_job


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    monkeypatch.setattr(os, "environ", known)
    return known


def test_a_process_alone_is_rank_0(environment: dict[str, str]):
    assert place_in_job(alone=False) == (0, 1)
    environment |= {"RANK": "", "WORLD_SIZE": ""}  # as some job scripts export them
    assert place_in_job(alone=False) == (0, 1)
    environment |= {"RANK": "3", "WORLD_SIZE": "8"}
    assert place_in_job(alone=False) == (3, 8)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "8"}, "RANK=x in the environment: must be a whole number of at least 0; unset it"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment: must be a whole number of at least 1"),
        ({"WORLD_SIZE": "1000"}, "WORLD_SIZE=1000 in the environment without RANK: start with torchrun, or unset it"),
        ({"RANK": "1"}, "RANK=1 in the environment: must be below WORLD_SIZE=1; start with torchrun"),
    ],
)
def test_other_places_are_refused(environment, capsys, variables: dict[str, str], message: str):
    environment |= variables
    assert main(["--mock-data", "--padded-vocab-size", "64", "--train-iters", "1"]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_plans_for_the_ranks_it_finds(environment, capsys):
    environment["WORLD_SIZE"] = "4"
    assert main(["--dry-run", "--padded-vocab-size", "64"]) == 0
    assert "4 = tensor 1 x context 1 x data 4" in capsys.readouterr().out


def test_a_dry_run_checks_the_vocabulary(capsys):
    tensor = "--dry-run --world-size 2 --tensor-model-parallel-size 2"
    assert main(f"{tensor} --padded-vocab-size 1001".split()) == 2
    assert (
        "--padded-vocab-size 1001 does not divide by --tensor-model-parallel-size 2: use 1002"
        in capsys.readouterr().err
    )
