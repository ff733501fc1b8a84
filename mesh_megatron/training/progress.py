"""How far a run is in each unit that settings are given in: steps, sequences, tokens; what was and what is to come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from mesh_megatron.config.training import TrainingConfig

Unit = Literal["steps", "sequences", "tokens"]


class Point(NamedTuple):
    """One place of a run, in every unit."""

    steps: float
    sequences: float
    tokens: float

    def of(self, unit: Unit) -> float:
        return getattr(self, unit)


class Course:
    """A line through points: between two of them every step is alike. After the last one steps go on as ``pace``."""

    def __init__(self, points: Sequence[Point], pace: Point) -> None:
        self.points, self.pace = tuple(points), pace

    def at(self, unit: Unit, amount: float) -> Point:
        """The point where ``amount`` of a unit is reached."""
        for start, step, end in self.legs():
            if end is None or amount <= end.of(unit):
                steps = (amount - start.of(unit)) / step.of(unit)
                return Point(*(begin + each * steps for begin, each in zip(start, step, strict=True)))
        raise AssertionError("the last leg has no end")

    def first_with_steps_left(self, steps: int, unit: Unit, end: float) -> float:
        """Where in ``unit``, before ``end`` of it, no more than ``steps`` steps are left for the first time.

        What counts is how long they seemed at each place: a larger batch later on leaves what has begun as it was.
        """
        for start, step, stop in self.legs():
            first = max(start.of(unit), end - steps * step.of(unit))
            if stop is None or first < stop.of(unit):
                return first
        raise AssertionError("the last leg has no end")

    def legs(self) -> Iterator[tuple[Point, Point, Point | None]]:
        """Start, one step, and end of each; the last one has no end."""
        for start, end in pairwise(self.points):
            if end.steps > start.steps:
                length = end.steps - start.steps
                yield start, Point(*((b - a) / length for a, b in zip(start, end, strict=True))), end
        yield self.points[-1], self.pace, None


def course_of(training: TrainingConfig, batch: int, seq_length: int, past: Sequence[Sequence[float]]) -> Course:
    """The course of a run that has come along ``past``, points of which the last is where it stands.

    It goes on with today's ``batch``, which a ramp-up may only grow to, and sequences of ``seq_length`` tokens.
    """
    points = [Point(*place) for place in past]
    while (size := training.ramped_batch_size(int(points[-1].sequences), batch)) < batch:
        steps, sequences, tokens = points[-1]
        points.append(Point(steps + 1, sequences + size, tokens + size * seq_length))
    return Course(points, Point(1, batch, batch * seq_length))
