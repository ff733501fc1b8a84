"""The number of loops of each training step."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from mesh_megatron.config.loops import LoopsConfig
from mesh_megatron.config.model import ModelConfig

MODEL = ModelConfig(layout="2+2R8+2", padded_vocab_size=128)
DRAWN = LoopsConfig(loops_sampling="poisson-lognormal", loops_mean=3.0)


@pytest.mark.parametrize(
    "loops",
    [
        DRAWN,
        LoopsConfig(loops_sampling="poisson-lognormal", loops_mean=3.0, loops_min=2, loops_max=5),
        LoopsConfig(loops_sampling="uniform", loops_min=3, loops_max=7),
        LoopsConfig(loops_sampling="schedule", loops_ramp_iters=700, loops_min=2),
        LoopsConfig(),
    ],
    ids=lambda loops: f"{loops.loops_sampling} from {loops.loops_min}",
)
def test_steps_have_the_shares(loops):
    steps = 4000
    shares = loops.shares(MODEL, steps)
    counts = Counter(loops.of_step(MODEL, 1, iteration) for iteration in range(1, steps + 1))
    assert counts.keys() <= shares.keys()
    assert math.isclose(sum(shares.values()), 1)
    for number, share in shares.items():
        assert abs(counts[number] / steps - share) < 4 * math.sqrt(share * (1 - share) / steps) + 1e-9
    assert loops.loops_min <= min(counts) and max(counts) <= loops.largest(MODEL)


def test_the_mean_is_the_mean():
    shares = DRAWN.shares(ModelConfig(layout="2+2R64+2"), 0)
    assert sum(number * share for number, share in shares.items()) == pytest.approx(3, abs=2e-3)
    # The variance of 1 + Poisson(r) is E r + Var r, and a log-normal r has Var r = (E r)^2 (exp(sigma^2) - 1).
    variance = sum((number - 3) ** 2 * share for number, share in shares.items())
    assert variance == pytest.approx(2 + 4 * (math.exp(0.25) - 1), rel=0.02)


def test_a_schedule_gives_each_number_an_equal_part():
    loops = LoopsConfig(loops_sampling="schedule", loops_ramp_iters=12, loops_min=2, loops_max=4)
    assert [loops.of_step(MODEL, 1, step) for step in range(1, 15)] == [2] * 4 + [3] * 4 + [4] * 6
    assert loops.shares(MODEL, 14) == {2: 4 / 14, 3: 4 / 14, 4: 6 / 14}
    assert loops.shares(MODEL, 0) == {2: 4 / 12, 3: 4 / 12, 4: 4 / 12}


def test_seed_and_iteration_decide():
    drawn = [[DRAWN.of_step(MODEL, seed, step) for step in range(1, 50)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("layout", "loops", "words"),
    [
        ("2+2R4+2", {"backprop_loops": 5}, "--backprop-loops 5 is over the 4 loops of a step: lower it or drop it"),
        ("2+2+2+2", {"backprop_loops": 1}, r"--backprop-loops 1 with --layout 2\+2\+2\+2: earlier loops of this core"),
        ("2+2R4+2", {"loops_sampling": "uniform", "loops_max": 5}, r"--loops-max 5 is over the 4 loops of --layout"),
        (
            "2+2R4+2",
            {"loops_sampling": "uniform", "loops_max": 3},
            r"--loops-max 3 with --layout 2\+2R4\+2: .* what --recurrence mesh has for .* use --layout 2\+2R3\+2",
        ),
        (
            "2+2R4+2",
            {"loops_sampling": "uniform", "loops_min": 5},
            "--loops-min 5 is over the largest number",
        ),
        (
            "2+2+2+2",
            {"loops_sampling": "uniform"},
            r"--loops-sampling uniform with --layout 2\+2\+2\+2: only",
        ),
        ("2+2R4+2", {"loops_sampling": "poisson-lognormal"}, "--loops-sampling poisson-lognormal needs --loops-mean"),
        ("2+2R4+2", {"loops_sampling": "schedule"}, "--loops-sampling schedule needs --loops-ramp-iters"),
        ("2+2R4+2", {"loops_sampling": "uniform", "loops_mean": 2.0}, "--loops-mean 2 is for --loops-sampling poisson"),
        ("2+2R4+2", {"loops_mean": 2.0}, "--loops-mean 2 is for --loops-sampling poisson-lognormal: drop it or"),
        (
            "2+2R4+2",
            {"loops_min": 2},
            "--loops-min and --loops-max bound a number that is drawn: give",
        ),
        (
            "2+2R4+2",
            {"loops_sampling": "poisson-lognormal", "loops_mean": 6.0},
            "--loops-mean 6 is not between --loops-min 1 and the largest number of loops, 4",
        ),
        ("2+2R4+2", {"loops_sampling": "poisson-lognormal", "loops_mean": 1.0}, "--loops-mean 1.0: must be above 1"),
    ],
)
def test_mistakes_name_flag_value_and_fix(layout, loops, words):
    with pytest.raises(ValueError, match=words):
        LoopsConfig(**loops).validate(ModelConfig(layout=layout))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"recurrence": "base"}, "--backprop-loops 1 with --recurrence base: only the first loop sees the prelude"),
        ({"recurrence": "anchor_emb"}, "--backprop-loops 1 with --recurrence anchor_emb"),
        ({"num_experts": 4}, "--backprop-loops 1 with --num-experts 4: the auxiliary losses"),
    ],
)
def test_models_that_need_all_gradients(model, words):
    with pytest.raises(ValueError, match=words):
        LoopsConfig(backprop_loops=1).validate(ModelConfig(layout="2+2R4+2", **model))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"recurrence": "mesh"}, "--recurrence mesh"),
        ({"recurrence": "hyper"}, "--recurrence hyper"),
        ({"recurrence": "hyper-dynamic"}, "--recurrence hyper-dynamic"),
        ({"recurrence": "attend"}, "--recurrence attend"),
        ({"recurrence": "base", "loop_embedding": True}, "--loop-embedding"),
        ({"recurrence": "base", "per_loop_norms": True}, "--per-loop-norms"),
        ({"recurrence": "base", "loop_lora_rank": 2}, "--loop-lora-rank"),
        *(
            ({"recurrence": name, "loop_norm": True}, None)
            for name in ("base", "residual", "anchor+anchor_emb", "static", "dynamic", "adapter", "decay")
        ),
    ],
    ids=str,
)
def test_no_loop_has_parameters_that_never_learn(settings, name):
    model, drawn = ModelConfig(layout="2+2R8+2", **settings), LoopsConfig(loops_sampling="uniform", loops_max=4)
    if name is None:
        drawn.validate(model)
    else:
        with pytest.raises(ValueError, match=f"--loops-max 4 .* what {name} has for loops after 4 would never learn"):
            drawn.validate(model)
    LoopsConfig(loops_sampling="uniform", loops_max=8).validate(model)
