"""--log-params-norm and --log-num-zeros-in-grad count every parameter once, under any layout of ranks."""

from __future__ import annotations

import pytest
import torch
from cases import CP2, DISTOPT, PP2, SMALLER, SP, TP2, Case, only_in_full, run_config
from rank_pool import RankPool
from test_moe import EP2, ETP1, EXPERTS
from training_runs import build_trainer, whole_gradients

from mesh_megatron.config.run import RunConfig

# Without biases: that of keys has no gradient but rounding, which is zero here and there.
MEASURES = "--log-params-norm --log-num-zeros-in-grad --clip-grad 0 --disable-bias-linear"
TIED = "--no-untie-embeddings-and-output-weights"
CASES = [Case("tp2-sp", 2, f"{TP2} {SP}"), Case("pp2-tied", 2, PP2, TIED), Case("distopt", 2, DISTOPT)]
MORE = [
    Case("cp2", 2, CP2),
    Case("two-copies-of-shares", 4, f"--use-torch-fsdp2 --num-distributed-optimizer-instances 2 {SMALLER}"),
    Case("ep2", 2, EP2, EXPERTS),
    Case("tp2-sp-ep2-etp1-distopt", 2, f"{TP2} {SP} {ETP1} {EP2} {DISTOPT}", EXPERTS),
]


def measures(run: RunConfig) -> list[tuple[float, float]]:
    """Norm of the weights and zeros in the gradients of two steps; with one rank compared with the model itself."""
    trainer, found = build_trainer(run), []
    for _ in range(2):
        result = trainer.step()
        found.append((result.measures["params-norm"], result.measures["num-zeros"]))
        if run.parallel.model_parallel_size == trainer.data_parallel_size == 1:
            weights = {weight for module in trainer.model.modules for weight in module.parameters()}
            norm = torch.stack([weight.detach().double().square().sum() for weight in weights]).sum().sqrt()
            zeros = sum(int((gradient == 0).sum()) for gradient in whole_gradients(trainer.model).values())
            assert found[-1] == (pytest.approx(norm.item(), rel=1e-12), zeros)
            assert zeros > 0 or not run.model.untie_embeddings_and_output_weights
    return found


@pytest.mark.parametrize("case", [*CASES, *only_in_full(MORE)], ids=lambda case: case.name)
def test_every_parameter_is_counted_once(case: Case, ranks: RankPool) -> None:
    """Rows of the embedding that no token names have no gradient."""
    (expected,) = ranks.run(1, measures, run_config(f"{case.model} {MEASURES}", steps=2))
    for found in ranks.run(case.ranks, measures, run_config(f"{case.model} {MEASURES}", case.layout, 2)):
        for (norm, zeros), (norm_there, zeros_there) in zip(found, expected, strict=True):
            assert norm == pytest.approx(norm_there, rel=1e-6)
            assert zeros == zeros_there
