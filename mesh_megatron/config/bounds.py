"""Bounds of a setting's values, written beside its type: ``lr: Annotated[float, Bounds(above=0)] = 6e-4``."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A range of finite numbers: ``least`` and ``most`` are included, ``above`` and ``below`` are not."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    zero: str = ""
    """Meaning of 0, where 0 is the smallest value and a special case, such as "no clipping"."""

    def hold(self, number: float) -> bool:
        """Return whether ``number`` is finite and within the bounds."""
        return (
            _finite(number)
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if self.zero:
            return f"0 ({self.zero}) or more"
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return (
            " and ".join(f"{words} {end:.10g}" for words, end in ends.items() if end is not None) or "a finite number"
        )


def _finite(number: float) -> bool:
    """Return whether a float can hold ``number``."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


Count = Annotated[int, Bounds(least=1)]


def flag(name: str) -> str:
    """Return the command-line flag of a setting: ``lr_decay_iters`` -> ``--lr-decay-iters``."""
    return "--" + name.replace("_", "-")


def check_bounds(settings: Any) -> None:
    """Raise ``ValueError`` for the first field out of bounds, naming flag, value and bounds; None always passes."""
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        for bounds in _bounds_in(hint):
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not bounds.hold(number):
                    finite = "" if _finite(number) or "finite" in str(bounds) else "finite and "
                    raise ValueError(f"{flag(name)} {number}: must be {finite}{bounds}")


def _bounds_in(hint: Any) -> Iterator[Bounds]:
    """Yield the bounds in a type hint, including those of union members and tuple items."""
    for part in typing.get_args(hint):
        if isinstance(part, Bounds):
            yield part
        else:
            yield from _bounds_in(part)
