"""The course of a run, past and planned, in each unit that settings use: steps, sequences, tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from mesh_megatron.config.training import TrainingConfig

Unit = Literal["steps", "sequences", "tokens"]


class Point(NamedTuple):
    """One place in the course of a run, in every unit."""

    steps: float
    sequences: float
    tokens: float

    def of(self, unit: Unit) -> float:
        """Return the place in ``unit``."""
        return getattr(self, unit)


class Course:
    """A polyline through points: all steps between two points have the same size."""

    def __init__(self, points: Sequence[Point], pace: Point) -> None:
        """``pace`` is the size of each step after the last of ``points``."""
        self.points, self.pace = tuple(points), pace

    def at(self, unit: Unit, amount: float) -> Point:
        """Return the point where ``amount`` of ``unit`` is reached."""
        for start, step, end in self.legs():
            if end is None or amount <= end.of(unit):
                steps = (amount - start.of(unit)) / step.of(unit)
                return Point(*(begin + each * steps for begin, each in zip(start, step, strict=True)))
        raise AssertionError("the last leg has no end")

    def first_with_steps_left(self, steps: int, unit: Unit, end: float) -> float:
        """Return the first place, in ``unit``, where at most ``steps`` steps are left before ``end``.

        The steps left are estimated at each place with the step size there, so a later change of the batch size does
        not move a decay that has already begun.
        """
        for start, step, stop in self.legs():
            first = max(start.of(unit), end - steps * step.of(unit))
            if stop is None or first < stop.of(unit):
                return first
        raise AssertionError("the last leg has no end")

    def legs(self) -> Iterator[tuple[Point, Point, Point | None]]:
        """Yield the start, the step size and the end of each leg; the end of the last leg is None."""
        for start, end in pairwise(self.points):
            if end.steps > start.steps:
                length = end.steps - start.steps
                yield start, Point(*((b - a) / length for a, b in zip(start, end, strict=True))), end
        yield self.points[-1], self.pace, None


def course_of(training: TrainingConfig, batch: int, seq_length: int, past: Sequence[Sequence[float]]) -> Course:
    """Return the course of a run through the points ``past``, the last of which is its present state.

    From there it continues with ``batch`` sequences per step (after any ramp-up) of ``seq_length`` tokens.
    """
    points = [Point(*place) for place in past]
    while (size := training.ramped_batch_size(int(points[-1].sequences), batch, seq_length)) < batch:
        steps, sequences, tokens = points[-1]
        points.append(Point(steps + 1, sequences + size, tokens + size * seq_length))
    return Course(points, Point(1, batch, batch * seq_length))
