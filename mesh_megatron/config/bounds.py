"""Which values a setting may have, written beside its type: ``lr: Annotated[float, Bounds(above=0)] = 6e-4``."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Finite numbers from ``least`` or ``above`` to ``most`` or ``below``."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    zero: str = ""
    """What 0 stands for, where it is the least and means something of its own."""

    def hold(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if self.zero:
            return f"0 ({self.zero}) or more"
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {end:g}" for words, end in ends.items() if end is not None) or "a finite number"


Count = Annotated[int, Bounds(least=1)]


def flag(name: str) -> str:
    """A setting's name as it is written on a command line."""
    return "--" + name.replace("_", "-")


def check_bounds(settings: Any) -> None:
    """``ValueError`` naming flag, value and bounds of the first field of a dataclass that lies outside; None passes."""
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        for bounds in _bounds_in(hint):
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not bounds.hold(number):
                    raise ValueError(f"{flag(name)} {number}: must be {bounds}")


def _bounds_in(hint: Any) -> Iterator[Bounds]:
    """Those of a type, of its alternatives and of its items."""
    for part in typing.get_args(hint):
        if isinstance(part, Bounds):
            yield part
        else:
            yield from _bounds_in(part)
