"""Train, evaluate and save on the fake GPU of ``machine.py``, each case as its rank would, and say what was counted.

``python steps.py DRIVER`` reads cases as lines of JSON from its input, and answers each with a line. All of them run in
this one process, for what takes long is to import.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

LIBRARIES = Path(importlib.util.find_spec("torch").origin).parent / "lib"  # type: ignore[union-attr,arg-type]
if __name__ == "__main__":
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for library in (LIBRARIES / "libtorch_cpu.so", sys.argv[1]):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

import machine  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

GPU = machine.FakeGpu()
machine.install(GPU)

import faults  # noqa: E402
from megatron.core.dist_checkpointing import state_dict_utils  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from torch.distributed.checkpoint import default_planner  # noqa: E402

import pretrain_mesh  # noqa: E402
from mesh_megatron.data import ranks  # noqa: E402
from mesh_megatron.training import pretrain  # noqa: E402
from mesh_megatron.training.callbacks.hang_watchdog import place_of  # noqa: E402
from mesh_megatron.training.step import StepResult  # noqa: E402
from mesh_megatron.training.trainer import Callback, Trainer  # noqa: E402

GPU.is_known_wait = lambda frame: place_of(frame, 0, 0.0, 0.0).waits

# One rank is alone here. That other ranks' parts make a checkpoint complete, and that rank 0 has come first, is not for
# it to see.
state_dict_utils.validate_sharding_integrity = lambda *args, **kwargs: None
default_planner._validate_global_plan = lambda *args: []
ranks._wait = lambda *args: None
ROUTED = 64  # tokens to experts in a micro-batch of the cases: two for each of 32 tokens
MOVE = moe_utils.maybe_move_tensor_to_cpu


def move_evenly(*args: Any, **kwargs: Any) -> Any:
    """Replace the numbers of routed tokens by equal ones."""
    moved = MOVE(*args, **kwargs)
    if hasattr(moved, "shape"):
        moved[...] = ROUTED // np.prod(moved.shape)
    return moved


moe_utils.maybe_move_tensor_to_cpu = move_evenly


class Meter(Callback):
    """Comes first among the callbacks, so that a step is counted with all that follows it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        """One entry per step: ``waits`` by place, ``operations``, the same for its second micro-batch, and the waits at
        lines that the watchdog of hangs takes for work."""
        self.left_behind: list[str] = []

    def start(self, trainer: Trainer) -> None:
        self._passes: list[tuple[Counter[str], int]] = []
        trainer.model.chunks[0].register_forward_pre_hook(lambda *_: self._passes.append(_counted()))

    def before_step(self, trainer: Trainer) -> None:
        self._end()
        self.left_behind = left_behind(trainer)
        GPU.forget()
        GPU.unknown_waits.clear()
        self._passes.clear()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        assert result.update.applied, result
        self._micro_batch = _difference(*self._passes[1:3]) if len(self._passes) > 2 else None

    def finish(self, trainer: Trainer) -> None:
        self._end()

    def _end(self) -> None:
        if not hasattr(self, "_micro_batch"):
            return
        unknown = sorted(GPU.unknown_waits)
        self.steps.append({"waits": dict(GPU.waits), "unknown waits": unknown, "operations": GPU.operations.total()})
        if self._micro_batch is not None:
            self.steps[-1] |= self._micro_batch


def _counted() -> tuple[Counter[str], int]:
    return Counter(GPU.waits), GPU.operations.total()


def _difference(before: tuple[Counter[str], int], after: tuple[Counter[str], int]) -> dict[str, Any]:
    return {"micro-batch waits": dict(after[0] - before[0]), "micro-batch operations": after[1] - before[1]}


def left_behind(trainer: Trainer) -> list[str]:
    """Names of parameters and buffers that are not on the GPU."""
    return [
        name
        for module in trainer.model.modules
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if not machine.on_gpu(tensor)
    ]


def answer_to(flags: list[str], rank: int, world_size: int, fault: str | None) -> dict[str, Any]:
    """Run the trainer and return its exit ``code`` or ``error``, and the meter's counts."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    meter, original = Meter(), pretrain._callbacks
    pretrain._callbacks = lambda *args: [meter, *original(*args)]
    answer: dict[str, Any] = {}
    try:
        with GPU, faults.planted(fault):
            answer["code"] = pretrain_mesh.main(flags)
    except Exception as error:
        answer |= {"error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[:20000]}
    finally:
        pretrain._callbacks = original
        if torch.distributed.is_initialized():  # the run has failed
            pretrain._leave()
    return answer | {"steps": meter.steps, "left behind": meter.left_behind}


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stderr.flush()
        print(f"\nANSWER {json.dumps(answer_to(**json.loads(line)))}", flush=True)
