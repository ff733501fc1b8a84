"""The learning rate schedule: warmup and decay in steps, sequences or tokens.

Decay is measured in the unit in which the length of training was given, warmup in the unit of its own flag. The rate
of a step therefore does not depend on the batch sizes, sequence lengths and restarts before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.training.optimizer import final_lr
from mesh_megatron.training.progress import Course, Point, Unit
from mesh_megatron.training.run_length import RunLength
from mesh_megatron.training.state import TrainState


@dataclass(frozen=True)
class Warmup:
    """The length of the warmup."""

    unit: Unit
    """Unit of the flag that gives the length."""
    length: float
    """In ``unit``."""
    end: float
    """Where the warmup ends, in the unit of the decay."""


class Curves(OptimizerParamScheduler):
    """Megatron-Core's curves, with a warmup that begins at the same share of the peak in all parameter groups."""

    def get_lr(self, param_group: dict) -> float:
        """Return the rate of a group; Megatron-Core would begin at one rate for all, above the peaks of some."""
        if self.num_steps >= self.lr_warmup_steps:
            return super().get_lr(param_group)
        peak = param_group.get("max_lr", self.max_lr)
        first = self.init_lr * (peak / self.max_lr)
        return first + (peak - first) * float(self.num_steps) / float(self.lr_warmup_steps)


class Schedule:
    """Sets learning rates on Megatron-Core's curves from the progress of the run, counted in ``unit``."""

    def __init__(self, curves: OptimizerParamScheduler, unit: Unit, warmup: Warmup) -> None:
        self.curves, self.unit, self.warmup = curves, unit, warmup

    def set_rates(self, state: TrainState) -> None:
        """Set the learning rates of the step that comes after ``state``."""
        place = Point(state.iteration, state.consumed_samples, state.consumed_tokens)
        warmed = place.of(self.warmup.unit)
        if warmed < self.warmup.length:
            # Multiply before dividing: the result is exact where both units are the same.
            self.curves.num_steps = warmed * self.warmup.end / self.warmup.length
        else:
            self.curves.num_steps = max(place.of(self.unit), self.warmup.end)
        self.curves.step(0)


def build_schedule(run: RunConfig, optimizer: MegatronOptimizer, length: RunLength) -> Schedule:
    """Return the schedule of ``run``; the optimizer has its rates only after ``set_rates``.

    Raises ``ValueError`` if the warmup is not shorter than the decay, or leaves too little of it for WSD's final decay.
    """
    training = run.training
    unit, end = _decay(training)
    warmup = _warmup(training, unit, end, length.course)
    if warmup.end >= end:
        raise ValueError(
            f"the learning rate warms up over {warmup.end:g} {unit} but decays over {end:g}: lower --lr-warmup-iters, "
            "-samples or -fraction, or raise --lr-decay-iters or -samples"
        )
    final = _final_decay(training, unit, end, length.course) if training.lr_decay_style == "WSD" else None
    if final is not None and training.has_length and final > (end - warmup.end) * (1 + 1e-9):
        raise ValueError(
            f"the final decay of --lr-decay-style WSD takes {final:g} {unit}, but the warmup over {warmup.end:g} "
            f"leaves {end - warmup.end:g} of {end:g}: lower --lr-wsd-decay-iters or -samples (default 10% of "
            "training), or the warmup"
        )
    curves = Curves(
        optimizer,
        init_lr=training.lr_warmup_init,
        max_lr=training.lr,
        min_lr=final_lr(training),
        lr_warmup_steps=warmup.end,
        lr_decay_steps=end,
        lr_decay_style=training.lr_decay_style,
        **_weight_decay(training, unit, length.course),
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=final,
        lr_wsd_decay_style=training.lr_wsd_decay_style,
    )
    return Schedule(curves, unit, warmup)


def _decay(training: TrainingConfig) -> tuple[Unit, int]:
    """Return the unit and the amount at which the learning rate reaches its final value."""
    if training.lr_decay_iters is not None:
        return "steps", training.lr_decay_iters
    if training.lr_decay_samples is not None:
        return "sequences", training.lr_decay_samples
    return _length(training)


def _length(training: TrainingConfig) -> tuple[Unit, int]:
    """Return the length of training in the unit in which it was given."""
    if training.train_samples is not None:
        return "sequences", training.train_samples
    if training.train_tokens is not None:
        return "tokens", training.train_tokens
    return "steps", max(training.train_iters or 0, 1)  # --eval-only needs no length


def _weight_decay(training: TrainingConfig, unit: Unit, course: Course) -> dict[str, Any]:
    """Return Megatron-Core's settings of a weight decay that grows over the length of training."""
    if training.weight_decay_incr_style == "constant":
        wd = training.weight_decay
        return {"start_wd": wd, "end_wd": wd, "wd_incr_steps": 1, "wd_incr_style": "constant"}
    given, total = _length(training)
    return {
        "start_wd": training.start_weight_decay,
        "end_wd": training.end_weight_decay,
        "wd_incr_steps": total if given == unit else course.at(given, total).of(unit),
        "wd_incr_style": training.weight_decay_incr_style,
    }


def _warmup(training: TrainingConfig, unit: Unit, end: float, course: Course) -> Warmup:
    if training.lr_warmup_samples is not None:
        return _warmup_of("sequences", training.lr_warmup_samples, unit, course)
    if training.lr_warmup_iters is not None:
        return _warmup_of("steps", training.lr_warmup_iters, unit, course)
    share = end * (0.01 if training.lr_warmup_fraction is None else training.lr_warmup_fraction)
    return _warmup_of(unit, share if share >= 1 else 0.0, unit, course)


def _warmup_of(given: Unit, length: float, unit: Unit, course: Course) -> Warmup:
    return Warmup(given, length, length if given == unit else course.at(given, length).of(unit))


def _final_decay(training: TrainingConfig, unit: Unit, end: float, course: Course) -> float:
    """Return the length of the final decay of WSD (warmup, stable, decay), in ``unit``."""
    if (sequences := training.lr_wsd_decay_samples) is not None:
        return end - course.at("sequences", max(course.at(unit, end).sequences - sequences, 0)).of(unit)
    steps = training.lr_wsd_decay_iters
    if steps is None:
        total = (training.train_iters or end) if unit == "steps" else end
        return max(total // 10, 1)
    return steps if unit == "steps" else end - course.first_with_steps_left(steps, unit, end)
