"""Reading checkpoints without Megatron, safely, and saying what is wrong with a damaged one."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
import torch
from hf_checkpoints import tiny, write_checkpoint

from mesh_megatron.checkpoint.manifest import seal
from mesh_megatron.checkpoint.reader import CheckpointReader, find_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    tensors = write_checkpoint(tmp_path / "run", tiny())
    return tmp_path / "run", tensors


def test_tensors_come_back(checkpoint):
    save, tensors = checkpoint
    reader = CheckpointReader(save)
    assert reader.config.model == tiny() and reader.resolved["iteration"] == 100
    assert reader.shapes == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        assert torch.equal(reader.read([key])[key], tensor)


def test_the_index_and_optimizer_state_are_not_weights(tmp_path):
    extra = {"optimizer.exp_avg.final_norm.weight": torch.ones(2), "rng.1.cpu": torch.ones(1, 9, dtype=torch.uint8)}
    write_checkpoint(tmp_path, tiny(), tensors={"final_norm.weight": torch.ones(32), **extra})
    assert list(CheckpointReader(tmp_path).shapes) == ["final_norm.weight"]


def test_which_iteration(tmp_path):
    for iteration in (3, 12):
        write_checkpoint(tmp_path, tiny(), iteration=iteration)
    assert CheckpointReader(tmp_path).folder.name == "iter_0000012"
    assert CheckpointReader(tmp_path, 3).folder.name == "iter_0000003"
    assert CheckpointReader(tmp_path / "iter_0000003").folder.name == "iter_0000003"
    assert CheckpointReader(tmp_path / "iter_0000003", 3).folder.name == "iter_0000003"
    with pytest.raises(ValueError, match="--iteration 12: --load .*iter_0000003 is another checkpoint; give one"):
        CheckpointReader(tmp_path / "iter_0000003", 12)
    there = f"give one that is there: {tmp_path}/iter_0000003, {tmp_path}/iter_0000012$"
    with pytest.raises(ValueError, match=f"no checkpoint iter_0000004 there; {there}"):
        CheckpointReader(tmp_path, 4)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for content, complaint in [
        (b"release", "no checkpoint release there"),
        (b"the last", "holds 'the last' instead of an iteration"),
        ("\u00b2".encode(), "instead of an iteration"),
        (b"\xff", "cannot be read: .*"),
        (b"7", "no checkpoint iter_0000007 there"),
    ]:
        tracker.write_bytes(content)
        with pytest.raises(ValueError, match=f"{complaint}; {there}"):
            CheckpointReader(tmp_path)
    tracker.unlink()
    with pytest.raises(ValueError, match=f"no {tracker.name} there; {there}"):
        CheckpointReader(tmp_path)


def test_a_released_checkpoint_of_megatron_lm(tmp_path):
    write_checkpoint(tmp_path, tiny(), iteration=3)
    (tmp_path / "iter_0000003").rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert find_checkpoint(tmp_path) == tmp_path / "release"


class Payload:
    """Unpickling this runs code."""

    def __reduce__(self):
        return (eval, ("open('ran', 'w').close()",))


def test_an_index_that_would_run_code_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save, _ = checkpoint
    (save / "iter_0000100" / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="builtins.eval is not allowed"):
        CheckpointReader(save)
    assert not (tmp_path / "ran").exists()


def test_tensor_files_that_would_run_code_are_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save, _ = checkpoint
    file = save / "iter_0000100" / "__0_0.distcp"
    size = file.stat().st_size
    file.write_bytes(pickle.dumps(Payload()).ljust(size, b"\0"))
    reader = CheckpointReader(save)
    with pytest.raises(ValueError, match="cannot read final_norm.weight"):
        reader.read(["final_norm.weight"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04broken"), ".metadata is corrupt"),
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({})), ".metadata is corrupt: it holds a dict"),
        (lambda folder: (folder / ".metadata").unlink(), "cannot read its index .metadata"),
        (lambda folder: (folder / "run_config.json").unlink(), "cannot read run_config.json"),
        (lambda folder: (folder / "run_config.json").write_text("{"), "run_config.json is corrupt"),
        (lambda folder: (folder / "run_config.json").write_text('{"resolved": 3}'), "resolved is no group of settings"),
        (
            lambda folder: (folder / "run_config.json").write_text('{"resolved": {}, "data": []}'),
            "run_config.json is corrupt: data is no group of settings",
        ),
        (
            lambda folder: (folder / "run_config.json").write_text('{"resolved": {}, "modle": {}}'),
            "did you mean 'model'",
        ),
    ],
)
def test_damaged_checkpoints(checkpoint, damage, complaint):
    save, _ = checkpoint
    damage(save / "iter_0000100")
    with pytest.raises(ValueError, match=complaint):
        CheckpointReader(save)


def test_settings_of_older_versions_that_had_no_effect(checkpoint):
    save, _ = checkpoint
    path = save / "iter_0000100" / "run_config.json"
    record = json.loads(path.read_text())
    record["parallel"] |= {"use_torch_fsdp2": False, "use_megatron_fsdp": False}
    record["data"]["reset_position_ids"] = False
    before = CheckpointReader(save).config
    path.write_text(json.dumps(record))
    assert CheckpointReader(save).config == before


def test_missing_and_truncated_tensors(checkpoint, tmp_path):
    save, _ = checkpoint
    reader = CheckpointReader(save)
    with pytest.raises(ValueError, match="has no tensor core.layers.9.x"):
        reader.read(["core.layers.9.x"])
    file = save / "iter_0000100" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot read output_layer.weight"):
        reader.read(["output_layer.weight"])
    with pytest.raises(ValueError, match="no such folder"):
        CheckpointReader(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no checkpoint there"):
        CheckpointReader(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a Hugging Face model already"):
        CheckpointReader(tmp_path)


def test_a_checkpoint_that_differs_from_its_manifest_is_refused(checkpoint):
    save, _ = checkpoint
    folder = save / "iter_0000100"
    seal(folder)
    CheckpointReader(save)
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not intact: __0_0.distcp has 5,000 bytes instead of"):
        CheckpointReader(save)


def test_reading_starts_neither_megatron_nor_a_process_group(checkpoint):
    save, _ = checkpoint
    code = (
        "import sys; from pathlib import Path; from mesh_megatron.checkpoint.reader import CheckpointReader\n"
        f"CheckpointReader(Path({str(save)!r})).read(['final_norm.weight'])\n"
        "import torch; assert not torch.distributed.is_initialized()\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'megatron'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
