"""Measurements of one training step of a rank (memory, traffic, operations) that a plan must have predicted."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.pipeline_parallel import schedules
from rank_pool import ROOT
from torch.multiprocessing.reductions import StorageWeakRef
from training_runs import build_trainer

from mesh_megatron.checkpoint.optimizer_state import MOMENTS, sub_optimizers
from mesh_megatron.config.run import RunConfig

sys.path.insert(0, str(ROOT / "benchmarks"))

from ring_traffic import Instruments  # noqa: E402


def observe(run: RunConfig) -> dict[str, Any]:
    """One warm step, one that watches memory, one that counts messages and notes the order of work."""
    trainer = build_trainer(run)
    trainer.step()
    memory = ActivationMemory()
    with memory.watched():
        trainer.step()
    instruments = Instruments()
    with instruments.installed():
        trainer.step()
    return {
        "hops": dict(instruments.hops),
        "work": instruments.work,
        "held": held_bytes(trainer),
        "activations": memory.peak,
        "stage": torch.distributed.get_rank() * run.parallel.pipeline_model_parallel_size
        // torch.distributed.get_world_size(),
    }  # fmt: skip


def held_bytes(trainer: Any) -> dict[str, int]:
    """Return the bytes of parameters, of gradients, and of moments with the float32 copies of parameters."""
    parameters = {p for module in trainer.model.modules for p in module.parameters()}
    states = [state for part in sub_optimizers(trainer.optimizer) for state in part.optimizer.state.values()]
    mains = [
        p.main_param for p in parameters if p.dtype != torch.float32 and getattr(p, "main_param", None) is not None
    ]
    return {
        "parameters": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(parameter.main_grad.nbytes for parameter in parameters if parameter.requires_grad),
        "optimizer": sum(state[moment].nbytes for state in states for moment in MOMENTS if moment in state)
        + sum(main.nbytes for main in mains),
    }


class ActivationMemory:
    """Bytes that a step has made and that still live, most at the end of a forward pass.

    Found are the storages that autograd saved and those of every tensor that Python can see; but for random states (the
    only uint8), which recomputation keeps: 16 bytes on a GPU and kilobytes here.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._before: set[int] = set()
        self._saved: dict[int, StorageWeakRef] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        gc.collect()
        self._before = set(_visible())
        original = schedules.forward_step

        def forward_step(*args: Any, **kwargs: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
                result = original(*args, **kwargs)
            self._look()
            return result

        with patch.object(schedules, "forward_step", forward_step):
            yield

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._saved[storage.data_ptr()] = StorageWeakRef(storage)
        return tensor

    def _look(self) -> None:
        live = _visible()
        for place, reference in self._saved.items():
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:  # its size now: recomputation may have emptied it
                live[place] = storage.nbytes()
        self.peak = max(self.peak, sum(size for place, size in live.items() if place not in self._before))


def _visible() -> dict[int, int]:
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor) and found.dtype != torch.uint8]
    tensors += [found.grad for found in tensors if found.is_leaf and found.grad is not None]  # Python has not seen them
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
