"""Each parameter's learning rate and weight decay, with rates of their own, under both optimizers."""

from __future__ import annotations

import pytest

from mesh_megatron.config import cli
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig
from mesh_megatron.training.state import TrainState

pytestmark = pytest.mark.usefixtures("one_rank")
SMALL = (
    "--layout 1+1R2+1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --padded-vocab-size 32 --mock-data "
    "--train-iters 12 --lr 1e-2 --weight-decay 0.1"
)
ROUTER, EMBEDDING, LAYER = "recurrence.routers.0.weight", "embedding.word_embeddings.weight", "mlp.linear_fc1.weight"


def courses(flags: str, steps: int = 12) -> dict[str, list[tuple[float, float]]]:
    """Return (learning rate, weight decay) of each step by parameter."""
    from mesh_megatron.parallel.build_model import build_model
    from mesh_megatron.training.lr_schedule import build_schedule
    from mesh_megatron.training.optimizer import build_optimizer
    from mesh_megatron.training.run_length import compute_run_length

    run = cli.parse_run(RunConfig, PRESETS, f"{SMALL} {flags}".split())
    run.validate(1)
    model = build_model(run, 32)
    names = {id(parameter): name for module in model.modules for name, parameter in module.named_parameters()}
    optimizer, state = build_optimizer(run, model), TrainState()
    schedule = build_schedule(run, optimizer, compute_run_length(run, 1, None))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names.values()}
    for _ in range(steps):
        schedule.set_rates(state)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found[names[id(parameter)]].append((group["lr"], group["weight_decay"]))
        state.count_step(1, 16)
    return found


def rates(found: dict[str, list[tuple[float, float]]], name: str) -> list[float]:
    course = next(course for each, course in found.items() if each.endswith(name))
    return [rate for rate, _ in course]


@pytest.mark.parametrize("style", ["cosine", "WSD --lr-wsd-decay-iters 4"])
@pytest.mark.parametrize(
    ("flags", "name", "factor"),
    [
        ("--router-lr-mult 0", ROUTER, 0),
        ("--router-lr-mult 0.1", ROUTER, 0.1),
        ("--decoupled-lr 1e-4", EMBEDDING, 0.01),
        ("--decoupled-lr 1e-1", EMBEDDING, 10),
        ("--optimizer muon --muon-scalar-lr 1e-3", EMBEDDING, 0.1),
    ],
)
def test_a_rate_of_its_own_is_a_multiple_of_all_others(flags: str, name: str, factor: float, style: str) -> None:
    """At each step: neither does its warmup begin above its peak, nor does it rise afterwards."""
    found = courses(f"{flags} --lr-warmup-iters 4 --lr-warmup-init 1e-3 --lr-decay-style {style}")
    usual = rates(found, LAYER)
    assert usual[:5] == pytest.approx([1e-3, 3.25e-3, 5.5e-3, 7.75e-3, 1e-2]) and usual[-1] < 1e-2
    assert rates(found, name) == pytest.approx([factor * rate for rate in usual])


def test_a_final_rate_that_is_given_is_taken() -> None:
    found = courses("--decoupled-lr 1e-4 --decoupled-min-lr 5e-5 --lr-decay-iters 8 --lr-warmup-iters 0")
    assert rates(found, EMBEDDING)[-1] == pytest.approx(5e-5) and rates(found, LAYER)[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("norms", ["", "--per-loop-norms --normalization RMSNorm --sandwich-norm"])
def test_matrices_alone_have_weight_decay(optimizer: str, norms: str) -> None:
    """A vector per loop is no matrix."""
    found = courses(f"--loop-embedding --loop-norm --optimizer {optimizer} {norms}", steps=1)
    for name, [(_, decay)] in found.items():
        vectors = name.endswith(".bias") or "norm" in name or "loop_embedding" in name
        assert decay == (0 if vectors else 0.1), name
    assert any("loop_embedding" in name for name in found)
