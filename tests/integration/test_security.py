"""Code in an untrusted checkpoint is never executed, neither in training nor by tools."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from integration_runs import SMALL

import pretrain_mesh
from mesh_megatron.checkpoint.folder import folder_of
from mesh_megatron.checkpoint.manifest import seal
from mesh_megatron.checkpoint.safe_unpickling import SafeReader

pytestmark = pytest.mark.full


class Payload:
    """Unpickling this runs code: it makes the file that MARK names."""

    mark = Path()

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    save = tmp_path_factory.mktemp("trained")
    assert pretrain_mesh.main([*SMALL, "--train-iters", "1", "--data-path", corpus, "--save", str(save)]) == 0
    return save


def as_a_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Payload()).ljust(file.stat().st_size, b"\0"))


def as_torch_saves(file: Path) -> None:
    with file.open("wb") as stream:  # torch refuses to name an archive .metadata
        torch.save(Payload(), stream)


def in_every_place(file: Path) -> None:
    """Where each tensor and object begins."""
    payload = pickle.dumps(Payload())
    for place in SafeReader(file.parent).index.storage_data.values():
        if place.relative_path == file.name:
            assert place.length > len(payload)
            with file.open("r+b") as stream:
                stream.seek(place.offset)
                stream.write(payload)


def pickled_files(checkpoint: Path) -> list[str]:
    """All files except JSON: any of the others might be unpickled."""
    return sorted(path.name for path in checkpoint.iterdir() if path.suffix != ".json")


@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}], ids=["plain", "forced"])
def test_training_runs_nothing_that_lies_in_a_checkpoint(train, trained, tmp_path, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    names = pickled_files(folder_of(trained, 1))
    assert {".metadata", "__0_0.distcp"} <= set(names)
    Payload.mark = tmp_path / "ran"
    for name in names:
        for write in (as_a_pickle, as_torch_saves, *([in_every_place] if name.endswith(".distcp") else [])):
            save = tmp_path / "run"
            shutil.copytree(trained, save)
            write(folder_of(save, 1) / name)
            seal(folder_of(save, 1))  # a stranger writes manifests too
            code, _, err = train("--train-iters", 2, "--save", save)
            assert not Payload.mark.exists(), name
            assert code == 2 and name in err.splitlines()[-1], (name, err)
            shutil.rmtree(save)
    pickle.loads(pickle.dumps(Payload())).close()
    assert Payload.mark.exists()


def test_tools_run_nothing_that_lies_in_a_checkpoint(trained, tmp_path, monkeypatch, capsys):
    from mesh_megatron.commands import checkpoint, export_hf

    Payload.mark = tmp_path / "ran"
    for name in (".metadata", "__0_0.distcp"):
        save = tmp_path / name / "run"
        shutil.copytree(trained, save)
        as_a_pickle(folder_of(save, 1) / name)
        seal(folder_of(save, 1))
        for main, *flags in (
            (export_hf.main, "--load", save, "--output", tmp_path / name / "export", "--no-tokenizer"),
            (checkpoint.main, "diff", save, trained),
        ):
            monkeypatch.setattr("sys.argv", ["tool", *map(str, flags)])
            assert main() == 2 and name in capsys.readouterr().err
    assert not Payload.mark.exists()
