"""Read the launch arguments that Megatron-LM stores in a checkpoint, without running code from it.

They lie in a pickle of ``torch.save``: in ``common.pt``, or since Megatron-Core 0.19 as an object among the tensors.
The pickle names many classes (enums, dtypes, functions); here each becomes an object that does nothing.
"""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from mesh_megatron.checkpoint.safe_unpickling import SafeReader

_KEY = "common_state/"


def stored_arguments(reader: SafeReader) -> dict[str, Any]:
    """Return Megatron-LM's arguments by name; empty if the checkpoint stores none.

    A value that is no plain number, string or container is an ``Opaque``. Raises ``ValueError`` if they are damaged.
    """
    legacy = reader.folder / "common.pt"
    if legacy.exists():
        state = _unpickle(legacy.read_bytes(), legacy)
    elif keys := [key for key in reader.index.state_dict_metadata if key.startswith(_KEY)]:
        state = next(iter(_unpickle(reader.read_object(keys[0]), reader.folder)), None)  # a list of one
    else:
        return {}
    arguments = state.get("args") if isinstance(state, dict) else None
    return dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}


class Opaque:
    """Any object of a pickle that is neither plain nor a namespace: what its code would make of it stays unknown."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    add = extend = append


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return argparse.Namespace if (module, name) == ("argparse", "Namespace") else Opaque

    def persistent_load(self, pid: Any) -> Opaque:
        return Opaque()  # the content of a tensor


def _unpickle(content: bytes, where: Path) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return _Unpickler(io.BytesIO(archive.read(name))).load()
    except Exception as error:  # a corrupt pickle can raise any exception
        raise ValueError(f"{where}: its arguments cannot be read: {error}") from error
