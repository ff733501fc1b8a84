"""A looped mixture of experts: the law of layouts, checkpoints across expert-parallel sizes, and its auxiliary loss.

Each function of ``parallel/megatron_patches.py`` on experts is needed by one of the cases at least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_layouts
import torch
import torch.nn.functional as F
from cases import (
    CP2,
    FULL,
    KEYS,
    LLAMA,
    OVERLAP,
    PARTS,
    PP2,
    SMALLER,
    SP,
    TP2,
    Case,
    only_in_full,
    only_nightly,
    run_config,
)
from rank_pool import RankPool
from training_runs import Sequences, build_trainer, resume, train_and_save, whole_gradients

from mesh_megatron.config.run import RunConfig
from mesh_megatron.parallel.groups import check_backend

EXPERTS = f"--num-experts 4 --moe-aux-loss-coeff 0.1 {SMALLER}"  # whose loss depends on the micro-batches
SEQUENCES = f"{EXPERTS} --moe-router-load-balancing-type seq_aux_loss"
Z_LOSS = f"{EXPERTS} --moe-aux-loss-coeff 0 --moe-z-loss-coeff 0.1"
SHARED = "--moe-shared-expert-intermediate-size 48 --disable-bias-linear"
SHARED_AGAIN = "--recompute-granularity selective --recompute-modules shared_experts"
SIGMOID = "--moe-router-score-function sigmoid --moe-router-topk-scaling-factor 2.5"
GROUPS = "--moe-router-pre-softmax --moe-router-num-groups 2 --moe-router-group-topk 1"
EP2, ETP1 = "--expert-model-parallel-size 2", "--expert-tensor-parallel-size 1"

CASES = [
    Case("ep2-distopt-overlap", 2, f"{EP2} {OVERLAP} --ddp-bucket-size 10000", EXPERTS),
    Case("tp2-sp-ep2-etp1", 2, f"{TP2} {SP} {ETP1} {EP2}", EXPERTS),
    Case("ep2-pp2-distopt-overlap-full-recompute", 4, f"{EP2} {PP2} {OVERLAP} {FULL}", EXPERTS),
]
MORE_CASES = [
    Case("ep2-top1-unshared-gated", 2, EP2, f"{EXPERTS} {LLAMA} --moe-router-topk 1 --layout 2+2+2+2"),
    Case("ep2-pp2-z-loss-full-recompute", 4, f"{EP2} {PP2} {FULL}", f"{EXPERTS} --moe-z-loss-coeff 0.1"),
    Case("ep2-sequence-loss", 2, EP2, SEQUENCES),
    Case("cp2-ep2", 2, f"{CP2} {EP2}", EXPERTS),
    Case("ep2-pp2-shared-keys", 4, f"{EP2} {PP2}", f"{EXPERTS} {KEYS}"),
    Case("ep2-pp2-shared-expert-recomputed", 4, f"{EP2} {PP2} {PARTS} moe", f"{EXPERTS} {SHARED}"),
    Case("tp2-sp-ep2-recomputed-shared-expert", 2, f"{TP2} {SP} {ETP1} {EP2} {SHARED_AGAIN}", f"{EXPERTS} {SHARED}"),
    Case("ep2-sigmoid-scaled", 2, EP2, f"{EXPERTS} {SIGMOID}"),
    Case("ep2-dp4-distopt-overlap", 4, f"{EP2} {OVERLAP}", EXPERTS),
    Case("tp2-sp-ep2-weights-of-losses", 2, f"{TP2} {SP} {ETP1} {EP2}", f"{EXPERTS} --loop-loss-weights 1 2", steps=3),
]
RARE_CASES = [
    Case("tp2-sp-ep2-etp1-z-loss", 2, f"{TP2} {SP} {ETP1} {EP2}", f"{EXPERTS} --moe-z-loss-coeff 0.1"),
    Case("tp2-sp", 2, f"{TP2} {SP}", f"{EXPERTS} --disable-bias-linear"),
    Case("ep2", 2, EP2, EXPERTS),
    Case("ep2-pp2-recomputed-experts", 4, f"{EP2} {PP2} {PARTS} moe", f"{EXPERTS} --moe-z-loss-coeff 0.1"),
    Case("sequence-loss-small-micro-batches", 1, "--micro-batch-size 1", SEQUENCES),
    Case("tp2-sp-etp1", 2, f"{TP2} {SP} {ETP1}", EXPERTS),
    Case("ep2-shared-expert", 2, EP2, f"{EXPERTS} {SHARED}"),
    Case("tp2-sp-ep2-shared-expert", 2, f"{TP2} {SP} {ETP1} {EP2}", f"{EXPERTS} {SHARED} {LLAMA}"),
    Case("tp2-sp-groups-before", 2, f"{TP2} {SP} {ETP1}", f"{EXPERTS} {GROUPS}"),
]
BY_NAME = {case.name: case for case in [*CASES, *MORE_CASES, *RARE_CASES]}


@pytest.mark.parametrize(
    "case", [*CASES, *only_in_full(MORE_CASES), *only_nightly(RARE_CASES)], ids=lambda case: case.name
)
def test_same_training(case: Case, ranks: RankPool, one_process: Callable) -> None:
    test_layouts.test_same_training(case, ranks, one_process)


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["tp2-sp-ep2-etp1", *only_nightly(["cp2-ep2"]), "ep2-pp2-distopt-overlap-full-recompute"]
)
def test_same_load_balancing_loss(name: str, ranks: RankPool) -> None:
    case = BY_NAME[name]
    (expected,) = ranks.run(1, auxiliary_losses, run_config(case.model))
    assert expected["load_balancing_loss"] >= 1  # what perfect balance has
    for actual in ranks.run(case.ranks, auxiliary_losses, run_config(case.model, case.layout)):
        assert actual == pytest.approx(expected, abs=1e-6)


def auxiliary_losses(run: RunConfig) -> dict[str, float]:
    return build_trainer(run).step().auxiliary_losses


@pytest.mark.full
@pytest.mark.parametrize("model", [*only_nightly([EXPERTS, SEQUENCES]), f"{EXPERTS} --layout 1+2R3+1", Z_LOSS])
def test_every_loop_adds_its_auxiliary_loss_once(model: str, ranks: RankPool) -> None:
    """Gradients and logged value against the sum written out over the routers' inputs, loop by loop."""
    ((gradients, logged),) = ranks.run(1, first_step, run_config(model))
    ((by_hand, mean),) = ranks.run(1, first_step_by_hand, run_config(model))
    assert list(logged.values()) == pytest.approx([mean], rel=1e-6)
    ((without, _),) = ranks.run(1, first_step, run_config(f"{model} --moe-aux-loss-coeff 0 --moe-z-loss-coeff 0"))
    for name, gradient in by_hand.items():
        assert np.linalg.norm(gradients[name] - gradient) < 1e-5 * np.linalg.norm(gradient), name
    router = "core.layers.0.mlp.router.weight"
    assert np.linalg.norm(without[router] - by_hand[router]) > 0.1 * np.linalg.norm(by_hand[router])


def first_step(run: RunConfig) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    trainer = build_trainer(run)
    gradients = _spied(trainer)
    logged = trainer.step().auxiliary_losses
    return gradients, logged


def first_step_by_hand(run: RunConfig) -> tuple[dict[str, np.ndarray], float]:
    """The same without Megatron-Core's auxiliary loss, and ours added to the loss; also the mean of ours."""
    from megatron.core.transformer.moe.router import TopKRouter

    from mesh_megatron.training import step

    trainer = build_trainer(run)
    trainer.model.config.moe_aux_loss_coeff = 0.0
    layout, seen = run.model.segments, []
    values: list[float] = []

    def see(router: TopKRouter, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        state_SBD, routed = inputs[0], output[1]
        logits = F.linear(state_SBD, router.weight, router.bias)
        if run.model.moe_z_loss_coeff:
            seen.append(logits.logsumexp(-1).square().mean())
        else:
            seen.append(balance(logits.softmax(-1), routed.view(logits.shape).float(), run))

    routers = [module for module in trainer.model.modules[0].modules() if isinstance(module, TopKRouter)]
    for router in routers:
        router.config.moe_aux_loss_coeff, router.config.moe_z_loss_coeff = 0.0, None
        router.register_forward_hook(see)
    original = step._loss
    batch, size = trainer.batch_size, run.training.micro_batch_size
    masks = [Sequences(run.model.seq_length, batch)[index]["loss_mask"] for index in range(batch)]
    tokens_a_micro_batch = float(sum(mask.sum() for mask in masks)) * size / batch

    def loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total, tokens, log = original(mask, losses)
        assert len(seen) == layout.core * layout.loops
        values.extend(float(value) for value in seen)
        coefficient = run.model.moe_z_loss_coeff or run.model.moe_aux_loss_coeff
        auxiliary = coefficient * sum(seen) * tokens_a_micro_batch
        seen.clear()
        return total + auxiliary, tokens, log

    step._loss = loss
    try:
        gradients = _spied(trainer)
        trainer.step()
    finally:
        step._loss = original
    return gradients, float(np.mean(values))


def balance(scores_SBE: torch.Tensor, routed_SBE: torch.Tensor, run: RunConfig) -> torch.Tensor:
    """E sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, eq. 4), of the batch or the mean over its sequences."""
    axes = (0, 1) if run.model.moe_router_load_balancing_type == "aux_loss" else 0
    share = routed_SBE.mean(axes) / run.model.moe_router_topk
    return (scores_SBE.shape[-1] * share * scores_SBE.mean(axes)).sum(-1).mean()


def _spied(trainer: Any) -> dict[str, np.ndarray]:
    """Filled with the first gradients when the trainer takes a step."""
    gradients: dict[str, np.ndarray] = {}
    original = trainer.optimizer.prepare_grads

    def prepare_grads() -> bool:
        gradients.update(whole_gradients(trainer.model))
        return original()

    trainer.optimizer.prepare_grads = prepare_grads
    return gradients


LAYOUTS = {
    "one": Case("one", 1, "", EXPERTS),
    "ep2": Case("ep2", 2, f"{EP2} {OVERLAP}", EXPERTS),
    "ep2-plain": Case("ep2-plain", 2, EP2, EXPERTS),
    "gated-one": Case("gated-one", 1, "", f"{EXPERTS} {LLAMA}"),
    "gated-ep2": Case("gated-ep2", 2, EP2, f"{EXPERTS} {LLAMA}"),
}


@pytest.mark.full
@pytest.mark.parametrize(
    ("source", "target"),
    [("one", "ep2"), ("ep2", "one"), ("ep2", "ep2-plain"), ("gated-ep2", "gated-one")],
)
def test_a_checkpoint_continues_on_any_expert_parallel_size(
    source: str, target: str, ranks: RankPool, one_process: Callable, tmp_path: Path
) -> None:
    first, then = LAYOUTS[source], LAYOUTS[target]
    expected = one_process(run_config(first.model)).losses
    saved = run_config(first.model, f"{first.layout} --save {tmp_path}")
    ranks.run(first.ranks, train_and_save, saved, 5)
    run = run_config(then.model, then.layout)
    for losses in ranks.run(then.ranks, resume, run, tmp_path / "iter_0000005"):
        np.testing.assert_allclose(losses, expected[5:], rtol=0, atol=1e-5)


def test_experts_split_both_ways_are_refused_without_a_gpu() -> None:
    run = run_config(f"{EXPERTS} --disable-bias-linear", f"{TP2} {SP} {EP2}")
    run.validate(4)
    with pytest.raises(ValueError, match="use --expert-tensor-parallel-size 1"):
        check_backend(dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, distributed_backend="gloo")))


@pytest.mark.full
def test_options_of_the_router_are_their_formulas(ranks: RankPool) -> None:
    for scores, weights in ranks.run(1, routing_by_options, run_config(EXPERTS), [SIGMOID, GROUPS, ""])[0]:
        np.testing.assert_allclose(scores, weights, rtol=1e-6)


def routing_by_options(run: RunConfig, options: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights [tokens, 4] of the model's first router, and by formula, with each of these options."""
    from mesh_megatron.parallel.build_model import build_model
    from mesh_megatron.parallel.groups import start_model_parallel, stop_model_parallel

    found = []
    for option in options:
        chosen = run_config(f"{EXPERTS} {option}")
        start_model_parallel(chosen)
        router = build_model(chosen, 96).modules[0].core[0].layers[0].mlp.router
        logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
        weights, _ = router.routing(logits.view(16, 1, 4))
        stop_model_parallel()
        if option == SIGMOID:
            best = logits.sigmoid().topk(2)
            expected = torch.zeros(16, 4).scatter(
                1, best.indices, 2.5 * best.values / best.values.sum(-1, keepdim=True)
            )
        elif option == GROUPS:  # both experts of the group with the larger sum
            probabilities = logits.softmax(-1).view(16, 2, 2)
            better = probabilities.sum(-1).argmax(-1)
            expected = torch.zeros(16, 2, 2)
            expected[range(16), better] = probabilities[range(16), better]
        else:
            best = logits.topk(2)
            expected = torch.zeros(16, 4).scatter(1, best.indices, best.values.softmax(-1))
        found.append((weights.detach().view(16, 4).numpy(), expected.view(16, 4).numpy()))
    return found
