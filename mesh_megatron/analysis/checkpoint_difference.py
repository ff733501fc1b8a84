"""Compare two checkpoints: settings, names and shapes of tensors, and values tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mesh_megatron.checkpoint.reader import CheckpointReader
from mesh_megatron.config.cli import to_dict


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that differs.

    Over its elements, ``largest`` is max |a - b| and ``relative`` is max |a - b| / max(|a|, |b|). Both are infinite if
    only one of two elements is finite.
    """

    name: str
    elements: int
    differing: int
    largest: float
    relative: float


@dataclass(frozen=True)
class CheckpointDifference:
    """The result of ``compare``; ``settings`` and ``shapes`` hold pairs (first checkpoint, second checkpoint)."""

    settings: dict[str, tuple[Any, Any]]
    only_first: list[str]
    only_second: list[str]
    shapes: dict[str, tuple[str, str]]
    tensors: list[TensorDifference] = field(default_factory=list)
    same: int = 0

    @property
    def empty(self) -> bool:
        """True if all tensors are equal; settings may differ."""
        return not (self.only_first or self.only_second or self.shapes or self.tensors)


def compare(
    first: CheckpointReader, second: CheckpointReader, progress: Callable[[int], object] = lambda count: None
) -> CheckpointDifference:
    """Compare every tensor, optimizer and random state included; ``progress`` is called with 1 for each."""
    shared = [name for name in first.all_shapes if name in second.all_shapes]
    found = CheckpointDifference(
        settings=_changed(_settings(first), _settings(second)),
        only_first=[name for name in first.all_shapes if name not in second.all_shapes],
        only_second=[name for name in second.all_shapes if name not in first.all_shapes],
        shapes={name: kinds for name in shared if len(set(kinds := (_kind(first, name), _kind(second, name)))) == 2},
    )
    same = 0
    for name in shared:
        if name not in found.shapes:
            difference = tensor_difference(name, first.read([name])[name], second.read([name])[name])
            if difference is None:
                same += 1
            else:
                found.tensors.append(difference)
        progress(1)
    return CheckpointDifference(**{**vars(found), "same": same})


def tensor_difference(name: str, first: torch.Tensor, second: torch.Tensor) -> TensorDifference | None:
    """Return the difference of two tensors, or None if all elements are equal; NaN equals NaN."""
    if torch.equal(first, second):
        return None
    a, b = first.double().flatten(), second.double().flatten()
    differs = (a != b) & ~(a.isnan() & b.isnan())
    if not differs.any():
        return None
    a, b = a[differs], b[differs]
    distance = (a - b).abs().nan_to_num(nan=torch.inf)
    relative = (distance / torch.maximum(a.abs(), b.abs())).nan_to_num(nan=torch.inf)
    return TensorDifference(name, first.numel(), len(a), float(distance.max()), float(relative.max()))


def _kind(reader: CheckpointReader, name: str) -> str:
    return f"{str(reader.dtype(name)).removeprefix('torch.')}{list(reader.all_shapes[name])}"


def _settings(reader: CheckpointReader) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def add(prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{name}.", value)
            else:
                flat[prefix + name] = value

    add("", to_dict(reader.config) | {"resolved": reader.resolved})
    return flat


def _changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [*first, *(name for name in second if name not in first)]
    pairs = {name: (first.get(name), second.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
