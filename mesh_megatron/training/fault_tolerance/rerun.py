"""Reruns of steps whose loss is not finite, with Megatron-Core's rerun state machine.

The step is computed again at once, from the same batch and random state. If the second result differs, the first was a
transient error of the device: it is reported with rank and node, and training uses the second. If both are the same,
the step is a bad step like any other (``callbacks/bad_steps.py``). The state machine's third option, a checkpoint from
which another device repeats the step, is not needed here: a run continues at the same step with the same batch wherever
it is started. Its mode that computes every step twice raises an error as of Megatron-Core 0.16.1.
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
    """Decides whether a step is computed again; every rank must construct one at the same time."""

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
        """Yield the micro-batches for each time that the step must be computed; the last result counts."""
        recorded = RerunDataIterator(batches) if batches is not None else None
        while self._machine.should_run_forward_backward(recorded):
            yield iter(recorded.__next__, None) if recorded is not None else None
        self._machine.should_checkpoint_and_exit()  # ends the step; returns False, as no result here is fatal

    def validate(self, loss: Tensor) -> None:
        """Ask for another attempt if a micro-batch's summed loss is not finite."""
        self._machine.validate_result(
            result=loss.detach(), rejection_func=_not_finite, message="loss is not finite", tolerance=0.0, fatal=False
        )


def once(batches: Iterator[Any] | None) -> Iterator[Iterator[Any] | None]:
    """Yield ``batches`` for a single attempt (``--rerun-mode disabled``)."""
    yield batches


def _not_finite(loss: Tensor) -> bool:
    return not bool(torch.isfinite(loss))


def _random_states() -> dict[str, Any]:
    return {"tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}


def _restore_random_states(states: dict[str, Any]) -> None:
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
