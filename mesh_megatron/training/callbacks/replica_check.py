"""A check that copies of weights on several ranks are bitwise equal; it names the ranks whose copies differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from mesh_megatron.parallel.build_model import RankModel
from mesh_megatron.parallel.collectives import gather
from mesh_megatron.training.fault_tolerance.run_status import WRONG_NUMBERS_EXIT_CODE
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer

Piece = tuple[str, tuple[int, ...]]  # a weight's name in checkpoints and the offset of this rank's shard in it
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 22


class ReplicaCheck(Callback):
    """Compares all copies of weights at the start and every ``interval`` steps; fails the run if any differ."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def start(self, trainer: Trainer) -> None:
        self._compare(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.state.iteration % self.interval == 0:
            self._compare(trainer)

    def _compare(self, trainer: Trainer) -> None:
        trainer.model.complete_weights()
        differences = disagreements(gather(weight_hashes(trainer.model)))
        if differences:
            more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
            trainer.fail(f"copies of weights differ: {'; '.join(differences[:3])}{more}", WRONG_NUMBERS_EXIT_CODE)


@torch.no_grad()
def weight_hashes(model: RankModel) -> dict[Piece, int]:
    """Return a hash of every shard of a weight that this rank holds."""
    pieces = {(shard.key, tuple(shard.global_offset)): hash_of(shard.data) for shard in _shards(model)}
    return {piece: int(value) for piece, value in pieces.items()}


def hash_of(tensor: Tensor) -> Tensor:
    """Return the sum of the tensor's words, each multiplied by a different odd number, modulo 2^64.

    A single flipped bit always changes the hash.
    """
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK].to(torch.int64)
        places = torch.arange(start, start + len(block), device=tensor.device)
        total += (block * (2 * places + 1)).sum()
    return total


def disagreements(hashes: list[dict[Piece, int]]) -> list[str]:
    """Return a line for every shard whose copies differ, naming the ranks in the minority; ``hashes`` is by rank."""
    copies: dict[Piece, dict[int, int]] = {}
    for rank, pieces in enumerate(hashes):
        for piece, value in pieces.items():
            copies.setdefault(piece, {})[rank] = value
    lines = []
    for (name, _), by_rank in sorted(copies.items()):
        (common, count), *others = Counter(by_rank.values()).most_common()
        if not others:
            continue
        if count == others[0][1]:
            lines.append(f"{name} on ranks {_list(by_rank)}, of which no majority agrees")
        else:
            odd = [rank for rank, value in by_rank.items() if value != common]
            rest = [rank for rank, value in by_rank.items() if value == common]
            lines.append(f"{name} on rank {_list(odd)}, not as on ranks {_list(rest)}")
    return lines


def _list(ranks: list[int] | dict[int, int]) -> str:
    return " ".join(map(str, ranks))


def _shards(model: RankModel) -> Iterator[ShardedTensor]:
    for module in model.modules:
        for entry in nested_values(module.sharded_state_dict()):
            for shard in nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]:
                if isinstance(shard, ShardedTensor) and shard.data is not None:
                    yield shard
