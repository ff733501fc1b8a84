"""Settings of the number of loops in a training step, K, and its distribution over the steps of a run."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Annotated, Literal

from mesh_megatron.config.bounds import Bounds, Count, check_bounds, flag
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.recurrence import scheme_spec

LOG_DEVIATION = 0.5
"""Standard deviation of the logarithm of the Poisson rate, as in arXiv 2502.05171."""
_QUANTILES = 1000
"""Rates in the mixture of Poisson distributions, at equal steps of probability."""
Shares = dict[int, float]
"""Share of steps by number of loops; they add up to 1."""


@dataclass(frozen=True, kw_only=True)
class LoopsConfig:
    """Loops: how often the core runs in each training step."""

    loops_sampling: Literal["fixed", "poisson-lognormal", "uniform", "schedule"] = "fixed"
    """Number of loops of a training step: always K of --layout (fixed), drawn anew for each step (poisson-lognormal,
    uniform), or growing over training (schedule). Evaluations and exports run K of --layout."""
    loops_mean: Annotated[float, Bounds(above=1)] | None = None
    """Mean of poisson-lognormal before the bounds: 1 more than a Poisson number whose rate is log-normal."""
    loops_min: Count = 1
    """Smallest number of loops; smaller draws become this."""
    loops_max: Count | None = None
    """Largest number of loops; default K of --layout, and no less where loops have parameters of their own. Larger
    draws become this."""
    loops_ramp_iters: Count | None = None
    """Steps over which schedule grows the number of loops, an equal part for each number."""

    backprop_loops: Count | None = None
    """Gradients pass through the last so many loops of a step only; earlier ones run without a graph. Default: all."""

    @property
    def sampled(self) -> bool:
        """True if the number of loops may differ from step to step."""
        return self.loops_sampling != "fixed"

    def validate(self, model: ModelConfig) -> None:
        """Raise ``ValueError`` naming the flag, its value and the fix."""
        check_bounds(self)
        self._validate_companions()
        self._validate_backprop(model)
        if not self.sampled:
            return
        layout, largest = model.segments, self.largest(model)
        if not layout.shared:
            raise ValueError(
                f"--loops-sampling {self.loops_sampling} with --layout {layout}: only a shared core can run another "
                "number of times; use a layout such as 4+8R4+4, or drop the flag"
            )
        if largest > layout.loops:
            raise ValueError(
                f"--loops-max {largest} is over the {layout.loops} loops of --layout {layout}: lower it, or raise R"
            )
        if largest < layout.loops and (name := _parameters_of_loops(model)):
            raise ValueError(
                f"--loops-max {largest} with --layout {layout}: evaluations and exports run {layout.loops} loops, and "
                f"what {name} has for loops after {largest} would never learn; use --layout "
                f"{replace(layout, loops=largest)}"
            )
        if self.loops_min > largest:
            raise ValueError(f"--loops-min {self.loops_min} is over the largest number of loops, {largest}: lower it")
        if self.loops_mean is not None and not self.loops_min <= self.loops_mean <= largest:
            raise ValueError(
                f"--loops-mean {self.loops_mean:g} is not between --loops-min {self.loops_min} and the largest number "
                f"of loops, {largest}: change one of them"
            )

    def _validate_backprop(self, model: ModelConfig) -> None:
        """Check that B is at most K, and that the prelude's gradient has a way around the loops left out."""
        if self.backprop_loops is None:
            return
        layout, largest, given = model.segments, self.largest(model), f"--backprop-loops {self.backprop_loops}"
        if self.backprop_loops > largest:
            raise ValueError(f"{given} is over the {largest} loops of a step: lower it or drop it")
        if not layout.shared:
            raise ValueError(f"{given} with --layout {layout}: earlier loops of this core would never learn; drop it")
        if model.num_experts is not None:
            raise ValueError(
                f"{given} with --num-experts {model.num_experts}: the auxiliary losses of loops without gradients "
                "would have no effect; drop one of the two"
            )
        if model.router_z_loss or model.router_entropy_loss:
            raise ValueError(
                f"{given} with --router-z-loss {model.router_z_loss:g} and --router-entropy-loss "
                f"{model.router_entropy_loss:g}: routers of loops without gradients could not follow; set both to 0"
            )
        if model.share_kv_across_loops:
            raise ValueError(
                f"{given} with --share-kv-across-loops: the first loop, which computes keys and values for all, would "
                "have no gradients; drop one of the two"
            )
        if not scheme_spec(model).injects_prelude:
            raise ValueError(
                f"{given} with --recurrence {model.recurrence}: only the first loop sees the prelude, so that it would "
                "get no gradient; use one that later loops see it in, such as anchor, static, decay, attend or mesh"
            )

    def _validate_companions(self) -> None:
        """Check that each flag belongs to the way of sampling."""
        needs = {"loops_mean": "poisson-lognormal", "loops_ramp_iters": "schedule"}
        for name, sampling in needs.items():
            value, shown = getattr(self, name), "--" + name.replace("_", "-")
            if value is None and self.loops_sampling == sampling:
                raise ValueError(f"--loops-sampling {sampling} needs {shown}: give it")
            if value is not None and self.loops_sampling != sampling:
                raise ValueError(f"{shown} {value:g} is for --loops-sampling {sampling}: drop it or sample so")
        if not self.sampled and (self.loops_min, self.loops_max) != (1, None):
            raise ValueError("--loops-min and --loops-max bound a number that is drawn: give --loops-sampling too")

    def largest(self, model: ModelConfig) -> int:
        """Return the largest number of loops in a step."""
        return model.segments.loops if self.loops_max is None or not self.sampled else self.loops_max

    def of_step(self, model: ModelConfig, seed: int, iteration: int) -> int:
        """Return the number of loops of step ``iteration`` (from 1), a function of the arguments alone."""
        if self.loops_sampling == "schedule":
            return self._scheduled(model, iteration)
        shares = self.shares(model, 0)
        place = _uniform(seed, iteration)
        for loops, share in shares.items():
            place -= share
            if place < 0:
                return loops
        return loops

    def shares(self, model: ModelConfig, iterations: int) -> Shares:
        """Return the expected share of steps by number of loops in a run of ``iterations`` steps (0: not known).

        Of a schedule of unknown length, only its growth counts.
        """
        smallest, largest = self.loops_min, self.largest(model)
        if self.loops_sampling == "uniform":
            return dict.fromkeys(range(smallest, largest + 1), 1 / (largest - smallest + 1))
        if self.loops_mean is not None and self.sampled:
            return _poisson_lognormal(self.loops_mean, smallest, largest)
        if self.loops_sampling == "schedule":
            steps = iterations or self.loops_ramp_iters or 1
            drawn = [self._scheduled(model, iteration + 1) for iteration in range(steps)]
            return {loops: drawn.count(loops) / steps for loops in sorted(set(drawn))}
        return {largest: 1.0}

    def _scheduled(self, model: ModelConfig, iteration: int) -> int:
        """Return the number of loops of a step of the schedule; each number has an equal part of the growth."""
        numbers = self.largest(model) - self.loops_min + 1
        grown = (iteration - 1) * numbers // (self.loops_ramp_iters or 1)
        return self.loops_min + min(grown, numbers - 1)


def _parameters_of_loops(model: ModelConfig) -> str:
    """Return the flag that gives single loops parameters of their own, or nothing if all loops share all."""
    for name in ("loop_embedding", "per_loop_norms", "loop_lora_rank"):
        if getattr(model, name):
            return flag(name)
    fewer = model.at_loops(max(model.segments.loops - 1, 1))
    alike = scheme_spec(model).parameters() == scheme_spec(fewer).parameters()
    return "" if alike else f"--recurrence {model.recurrence}"


def loops_without_gradients(loops: int, backprop_loops: int | None) -> int:
    """Return how many of the first ``loops`` loops run without gradients."""
    return 0 if backprop_loops is None else max(0, loops - backprop_loops)


def _uniform(seed: int, iteration: int) -> float:
    """Return a number in [0, 1) from a hash, the same on every machine and in every version of every library."""
    digest = hashlib.sha256(f"loops of step {iteration}, seed {seed}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


@functools.cache
def _poisson_lognormal(mean: float, smallest: int, largest: int) -> Shares:
    """Return the distribution of 1 + Poisson(rate), with a log-normal rate of mean ``mean`` - 1, put into the bounds.

    As arXiv 2502.05171 draws the number of loops. The rate's distribution is a mixture of its quantiles.
    """
    normal = NormalDist(math.log(mean - 1) - LOG_DEVIATION**2 / 2, LOG_DEVIATION)
    rates = [math.exp(normal.inv_cdf((i + 0.5) / _QUANTILES)) for i in range(_QUANTILES)]
    below = 0.0
    shares: Shares = {}
    for loops in range(1, largest):
        events = loops - 1
        share = math.fsum(math.exp(events * math.log(r) - r - math.lgamma(loops)) for r in rates) / _QUANTILES
        shares[max(loops, smallest)] = shares.get(max(loops, smallest), 0.0) + share
        below += share
    shares[largest] = shares.get(largest, 0.0) + max(0.0, 1 - below)
    return shares
