"""Megatron-Core's rerun state machine: was a wrong number in the data, or an error of this device that goes away?

A step whose loss is not finite is computed again on the spot, from the same batch and random state. A result that is
another one the second time was a device's error, is reported with rank and node, and training uses the second. One that
is the same is a bad step like any other (``callbacks/bad_steps.py``). The machine's third way, a checkpoint from which
another device decides, is not needed here: a run continues at the same step with the same batch wherever it is started.
Its mode that computes every step twice raises as of 0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.rerun_state_machine import (
    RerunDataIterator,
    RerunDiagnostic,
    RerunErrorInjector,
    RerunMode,
    get_rerun_state_machine,
    initialize_rerun_state_machine,
)
from torch import Tensor

from mesh_megatron.config.training import TrainingConfig


class Reruns:
    """Computes steps again; every rank makes one at the same time."""

    def __init__(self, training: TrainingConfig) -> None:
        initialize_rerun_state_machine(
            mode=RerunMode(training.rerun_mode),
            state_save_func=_random_states,
            state_restore_func=_restore_random_states,
            error_injector=RerunErrorInjector(
                training.error_injection_rate, RerunDiagnostic(training.error_injection_type)
            ),
        )
        self._machine = get_rerun_state_machine()

    def attempts(self, batches: Iterator[Any] | None) -> Iterator[Iterator[Any] | None]:
        """Micro-batches for each time that the step is to be computed, the last of which counts."""
        recorded = RerunDataIterator(batches) if batches is not None else None
        while self._machine.should_run_forward_backward(recorded):
            yield iter(recorded.__next__, None) if recorded is not None else None
        self._machine.should_checkpoint_and_exit()  # it is told that the step is over; nothing here is fatal

    def validate(self, loss: Tensor) -> None:
        """Ask for another attempt if a micro-batch's summed loss is not finite."""
        self._machine.validate_result(
            result=loss.detach(), rejection_func=_not_finite, message="loss is not finite", tolerance=0.0, fatal=False
        )


def once(batches: Iterator[Any] | None) -> Iterator[Iterator[Any] | None]:
    """One attempt: what ``--rerun-mode disabled`` makes of a step."""
    yield batches


def _not_finite(loss: Tensor) -> bool:
    return not bool(torch.isfinite(loss))


def _random_states() -> dict[str, Any]:
    return {"tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}


def _restore_random_states(states: dict[str, Any]) -> None:
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
