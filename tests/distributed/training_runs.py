"""Training as the trainer does it, in the ranks of a pool: what they compute comes back as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import rank_preload  # noqa: F401  (before megatron.core)
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.utils.data import Dataset

from mesh_megatron.config.run import RunConfig
from mesh_megatron.data.batches import BatchShard, MicroBatches
from mesh_megatron.model import initialize
from mesh_megatron.model.initialize import initial_value, place_in_complete
from mesh_megatron.parallel.build_model import RankModel, build_model
from mesh_megatron.parallel.groups import data_parallel, on_first_stage, on_last_stage, start_model_parallel
from mesh_megatron.platform import device
from mesh_megatron.training.checkpointer import Checkpointer
from mesh_megatron.training.lr_schedule import build_schedule
from mesh_megatron.training.metrics.writer import MetricsWriter
from mesh_megatron.training.optimizer import build_optimizer
from mesh_megatron.training.run_length import compute_run_length
from mesh_megatron.training.state import TrainState
from mesh_megatron.training.trainer import RunData, Trainer

VOCABULARY = 96


@dataclass(frozen=True)
class TrainingRecord:
    """Results of a run, the same on every rank."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, np.ndarray]
    """Complete gradients of the first step before clipping, by the parameter's checkpoint name; empty by default."""
    evaluation: float | None


class Records(MetricsWriter):
    """Keeps the records instead of writing them."""

    def __init__(self) -> None:
        self.written: list[Mapping[str, Any]] = []

    def write(self, record: Mapping[str, Any]) -> None:
        self.written.append(record)


class Sequences(Dataset):
    """Token sequences with some structure to learn, and a loss mask that differs from place to place.

    With ``documents`` each is two documents that must not see each other.
    """

    def __init__(self, length: int, count: int, documents: bool = False) -> None:
        self.length, self.count, self.documents = length, count, documents

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = np.random.default_rng(index)
        tokens = (draw.integers(VOCABULARY) + np.cumsum(draw.integers(1, 4, self.length + 1))) % VOCABULARY
        mask = draw.random(self.length) > 0.2
        row = torch.from_numpy(tokens)
        sample = {"tokens": row[:-1].clone(), "labels": row[1:].clone(), "loss_mask": torch.from_numpy(mask).float()}
        if self.documents:
            seen = torch.ones(self.length, self.length, dtype=torch.bool).tril()
            start = int(draw.integers(1, self.length))
            seen[start:, :start] = False
            sample["attention_mask"] = ~seen[None]
        return sample


def build_trainer(run: RunConfig, source: Path | None = None) -> Trainer:
    """A trainer of this rank, of a model that starts from the seed; as long as one that continues ``source``."""
    start_model_parallel(run)
    with patch.object(initialize, "initial_value", _away_from_zero):
        model = build_model(run, VOCABULARY)
    optimizer = build_optimizer(run, model)
    length = compute_run_length(run, device.world_size(), source)
    schedule = build_schedule(run, optimizer, length)
    rank, ranks = data_parallel()

    def stream() -> MicroBatches | None:
        masks = run.data.reset_attention_mask
        if not (on_first_stage() or on_last_stage() or masks):
            return None
        shard = BatchShard(
            micro_batch_size=run.training.micro_batch_size, data_parallel_rank=rank, data_parallel_size=ranks
        )
        return MicroBatches(Sequences(run.model.seq_length, 512, masks), shard, wrap=True)

    data = RunData(stream(), {"validation": stream()}, None, False)
    return Trainer(
        run=run, model=model, optimizer=optimizer, schedule=schedule, data=data, state=TrainState(), callbacks=[],
        total_iters=length.total_iters, data_parallel_size=ranks,
    )  # fmt: skip


def _away_from_zero(name: str, *args: Any) -> Tensor:
    """Draw B of low-rank differences as A is drawn: with B = 0 the gradients of A would be zero under any layout."""
    return initial_value(f"{name.removesuffix('.loop_up')}.loop_down" if name.endswith(".loop_up") else name, *args)


def checkpointer_of(trainer: Trainer) -> Checkpointer:
    return Checkpointer(
        trainer.run, trainer.model, trainer.optimizer, trainer.state, {"padded_vocab_size": VOCABULARY}
    )  # fmt: skip


def resumed_trainer(run: RunConfig, checkpoint: Path) -> Trainer:
    """A trainer that continues from a checkpoint, as ``training/pretrain.py`` starts one."""
    trainer = build_trainer(run, checkpoint)
    checkpointer_of(trainer).load(checkpoint)
    return trainer


def train(run: RunConfig, with_gradients: bool = False, evaluate: bool = False) -> TrainingRecord:
    """All of ``run``, and the loss on validation data after it."""
    trainer = build_trainer(run)
    gradients: dict[str, np.ndarray] = {}
    if with_gradients:
        _spy_on_first_gradients(trainer, gradients)
    losses, grad_norms = steps(trainer, trainer.total_iters)
    evaluation = trainer.evaluate(trainer.data.valid["validation"]) if evaluate else None
    return TrainingRecord(losses, grad_norms, gradients, evaluation)


def train_and_save(run: RunConfig, count: int) -> list[float]:
    """The first ``count`` steps of ``run``, and a checkpoint in its ``--save``."""
    trainer = build_trainer(run)
    losses, _ = steps(trainer, count)
    checkpointer = checkpointer_of(trainer)
    checkpointer.save()
    checkpointer.close()
    return losses


def resume(run: RunConfig, checkpoint: Path) -> list[float]:
    """Losses of the rest of ``run``, continued from a checkpoint."""
    trainer = resumed_trainer(run, checkpoint)
    losses, _ = steps(trainer, trainer.total_iters - trainer.state.iteration)
    return losses


def steps(trainer: Trainer, count: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the next ``count`` steps."""
    results = [trainer.step() for _ in range(count)]
    assert all(result.update.applied for result in results)
    return [result.loss for result in results], [result.update.grad_norm for result in results]


def _spy_on_first_gradients(trainer: Trainer, gradients: dict[str, np.ndarray]) -> None:
    optimizer: Any = trainer.optimizer
    original = optimizer.prepare_grads

    def prepare_grads() -> bool:
        if trainer.state.iteration == 0:
            gradients.update(whole_gradients(trainer.model))
        return original()

    optimizer.prepare_grads = prepare_grads


@torch.no_grad()
def whole_gradients(model: RankModel) -> dict[str, np.ndarray]:
    """Every parameter's reduced gradient, assembled from all ranks by checkpoint name; copies must agree."""
    for chunk in model.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            if buffer.ddp_config.use_distributed_optimizer:
                _gather_reduced_shards(buffer)
    mine = [
        (shard.key, shard.global_shape, place_in_complete(shard), shard.data.cpu().clone())
        for shard in _gradient_shards(model)
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, np.ndarray] = {}
    for key, shape, place, shard in (entry for rank in everyone for entry in rank):
        target = whole.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
        part = shard.float().numpy()
        if not np.isnan(target[place]).any():
            np.testing.assert_allclose(target[place], part, rtol=1e-5, atol=1e-7, err_msg=f"copies of {key}")
        target[place] = part
    assert not any(np.isnan(tensor).any() for tensor in whole.values()), "some gradient is missing on all ranks"
    return whole


def _gather_reduced_shards(buffer: Any) -> None:
    """With a distributed optimizer each rank has only its share of a bucket reduced: collect all shares."""
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
        dist.all_gather_into_tensor(bucket.grad_data, share, group=group)


def _gradient_shards(model: RankModel) -> Iterator[ShardedTensor]:
    """The model's sharded state with gradients in place of parameters."""
    for module in model.modules:
        parameters = {id(parameter): parameter for parameter in module.parameters()}
        for entry in nested_values(module.sharded_state_dict()):
            parameter = parameters.get(id(getattr(entry, "data", None)))
            if parameter is None or not parameter.requires_grad:
                continue
            entry.data = parameter.main_grad
            yield from nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]


def parameter_names(run: RunConfig) -> set[str]:
    """Return the checkpoint names of the parameters that this rank holds."""
    start_model_parallel(run)
    model = build_model(run, VOCABULARY)
    return {shard.key for module in model.modules for shard in nested_values(module.sharded_state_dict())}
