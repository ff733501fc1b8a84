"""Checkpoints that hold more than tensors: what PyTorch's own reader would run, ours refuses and names."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from mesh_megatron.checkpoint.safe_unpickling import SafeReader, cause, is_scales, read_plainly, read_scales

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Payload:
    """Unpickling this runs code."""

    def __reduce__(self):
        return (eval, ("open('ran', 'w').close()",))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(folder: Path, **state) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def load(reader: dcp.FileSystemReader, **state) -> dict:
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def test_tensors_and_plain_objects_come_back(here):
    folder = save(here / "c", x=torch.arange(4), progress={"iteration": 3, "names": ["a"]})
    loaded = load(SafeReader(folder), x=torch.zeros(4, dtype=torch.int64), progress={"iteration": 0, "names": [""]})
    assert loaded["x"].tolist() == [0, 1, 2, 3] and loaded["progress"] == {"iteration": 3, "names": ["a"]}


def test_an_object_in_a_tensor_file(here):
    folder = save(here / "c", x=Payload())
    with pytest.raises(CheckpointException) as refused:
        load(SafeReader(folder), x=0)
    assert cause(refused.value).startswith(f"{folder}/__0_0.distcp cannot be read: UnpicklingError: Weights only load")
    assert not (here / "ran").exists()
    load(dcp.FileSystemReader(folder), x=0)  # PyTorch's reader is what the guard is for
    assert (here / "ran").exists()


def test_an_index(here):
    folder = save(here / "c", x=torch.zeros(2))
    (folder / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"c: its index .metadata is corrupt: builtins.eval is not allowed"):
        SafeReader(folder)
    assert not (here / "ran").exists()


class Attribute:
    """Pickled as an attribute of ``owner``: Python 3.11.0 to 3.11.3 pickle members of an Enum so."""

    def __init__(self, owner: object, name: str) -> None:
        self.state = owner, name

    def __reduce__(self):
        return getattr, self.state


def test_members_of_an_enum_as_python_3_11_2_pickles_them(here):
    folder = save(here / "c", x=torch.arange(2))
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = {"kind": Attribute(WriteItemType, "TENSOR")}
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert SafeReader(folder).index.planner_data == {"kind": WriteItemType.TENSOR}
    index.planner_data = {"kind": Attribute(Metadata, "__init__")}
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(
        ValueError, match=r"builtins.getattr is only allowed for members of an Enum, not for '__init__'"
    ):
        SafeReader(folder)


def test_an_index_that_leads_outside(here):
    folder = save(here / "c", x=torch.zeros(2))
    reader = SafeReader(folder)
    for info in reader.index.storage_data.values():
        info.relative_path = "../elsewhere.distcp"
    (here / "elsewhere.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    with pytest.raises(CheckpointException) as refused:
        load(reader, x=torch.zeros(2))
    assert "names ../elsewhere.distcp, a file outside" in cause(refused.value)


def test_a_file_of_torch_save(here):
    torch.save({"train_state": {"iteration": 1}}, here / "common.pt")
    assert read_plainly(here / "common.pt") == {"train_state": {"iteration": 1}}
    torch.save({"train_state": Payload()}, here / "common.pt")
    with pytest.raises(ValueError, match="common.pt cannot be read: UnpicklingError"):
        read_plainly(here / "common.pt")
    assert not (here / "ran").exists()


def as_bytes(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def test_scales_are_tensors_and_plain_values(here):
    state = {"scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1, "fp8_max_fwd": 448.0}}
    read = read_scales(as_bytes(state))
    assert torch.equal(read.pop("scale_fwd"), state.pop("scale_fwd")) and read == state
    assert read_scales(torch.empty(0, dtype=torch.uint8)) is None


def test_scales_that_would_run_code_are_refused(here):
    with pytest.raises(ValueError, match="builtins.eval is not allowed in the state of FP8 scaling"):
        read_scales(as_bytes({"recipe": Payload()}))
    assert not (here / "ran").exists()
    with pytest.raises(ValueError):
        read_scales(as_bytes({"scale_fwd": torch.ones(300)})[:200])


@pytest.mark.parametrize("key", ["core.layers.0.mlp.linear_fc1._extra_state", "mlp.experts.linear_fc1._extra_state3"])
def test_names_of_scales(key):
    assert is_scales(key) and not is_scales(key.replace("_extra_state", "weight"))
