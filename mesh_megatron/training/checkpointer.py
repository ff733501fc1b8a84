"""Saving and loading checkpoints, which are complete or absent and do not depend on the layout of ranks.

``SAVE/iter_0000100/`` holds Megatron-Core's distributed checkpoint (PyTorch's format), ``run_config.json`` with
everything that tools need to know, and ``manifest.json``. The folder is written under a temporary name and renamed when
every rank has finished; then ``latest_checkpointed_iteration.txt`` names it. Every attempt has its own temporary name,
because the writers of a killed rank may still be running.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from mesh_megatron.checkpoint.async_writer import AsyncWriter
from mesh_megatron.checkpoint.exact_weights import SavedWeights
from mesh_megatron.checkpoint.folder import (
    CONFIG,
    TRACKER,
    WRITING,
    SaveFailed,
    delete_checkpoint,
    folder_of,
    multiples,
    saved_iterations,
)
from mesh_megatron.checkpoint.manifest import Files, describe, take_records, write_and_record, write_manifest
from mesh_megatron.checkpoint.megatron_reader import (
    foreign_scales,
    open_checkpoint,
    read_sharded,
    stop_reading_if_any,
    without_missing_scales,
)
from mesh_megatron.checkpoint.megatron_writer import (
    failure_reason,
    free_space,
    request_save,
    share_among_replicas,
    write_format,
)
from mesh_megatron.checkpoint.optimizer_state import (
    MOMENTS,
    current_step,
    is_slice,
    restore_state,
    set_step,
    state_to_load,
    state_to_save,
    weights_to_save,
    without_slices,
)
from mesh_megatron.checkpoint.rng_state import restore_rng, rng_state
from mesh_megatron.checkpoint.safe_unpickling import SafeReader, is_scales
from mesh_megatron.config import cli
from mesh_megatron.config.exits import EXIT_GATE
from mesh_megatron.config.run import RunConfig
from mesh_megatron.parallel.build_model import RankModel
from mesh_megatron.parallel.collectives import first_failure, gather, largest
from mesh_megatron.parallel.fully_sharded import sharded_state
from mesh_megatron.platform import device
from mesh_megatron.training.loss_scale import shared_loss_scale
from mesh_megatron.training.run_length import takes_weights_only
from mesh_megatron.training.state import TrainState
from mesh_megatron.util.atomic_files import write_atomically


class Checkpointer:
    """Saves and restores the complete state of a run: weights, optimizer, random states and progress."""

    def __init__(
        self,
        run: RunConfig,
        model: RankModel,
        optimizer: MegatronOptimizer,
        state: TrainState,
        resolved: dict[str, Any],
    ) -> None:
        """``resolved`` holds what tools need in addition to the settings, such as the size of the padded vocabulary."""
        self.run, self.model, self.optimizer, self.state, self.resolved = run, model, optimizer, state, resolved
        self._queue = AsyncWriter() if run.checkpoint.async_save else None
        self._writing: Path | None = None
        self._failures: list[str] = []
        """Why this rank could not write the newest checkpoint."""

    def save(self) -> None:
        """Write a checkpoint of this iteration; with --async-save copy the state and write it while training continues.

        Raises ``SaveFailed`` on every rank if any rank cannot write, here or when the background write has finished.
        The incomplete checkpoint is then removed, and older checkpoints are unchanged.
        """
        assert self.run.checkpoint.save is not None
        self.finish_pending(wait=True)
        self.model.complete_weights()
        final = folder_of(self.run.checkpoint.save, self.state.iteration)
        first = self._writing is None
        self._writing = final.with_name(f".{final.name}{WRITING}{gather(secrets.token_hex(4))[0]}")
        self._make_folder(self._writing)
        self._failures = []
        request = request_save(self._state_dict(), self._writing, self._failures, validate=first)
        writes = request.async_fn is not None
        if writes:
            write = partial(write_and_record, request.async_fn, self._writing, device.rank())
            request = request._replace(async_fn=write)
        request.add_finalize_fn(partial(self._publish, self._writing, final, self._record(), writes))
        if self._queue is not None:
            self._queue.start(request, self._failures)
            return
        try:
            request.execute_sync()
        except CheckpointException as error:
            self._stop_if_any(failure_reason(error))

    def finish_pending(self, wait: bool = False) -> None:
        """Publish a background write that has finished; with ``wait`` wait until it has.

        Raises ``SaveFailed`` as ``save`` does.
        """
        if self._queue is None:
            return
        try:
            self._queue.maybe_finalize_async_calls(blocking=wait)
        except CheckpointException as error:
            self._stop_if_any("; ".join(self._failures) or None)  # the cause, if a rank could not begin
            self._stop_if_any(failure_reason(error))

    def close(self) -> None:
        """Wait for background writes and stop their process."""
        self.finish_pending(wait=True)
        if self._queue is not None:
            self._queue.close()

    def _make_folder(self, folder: Path) -> None:
        failure = None
        if device.rank() == 0:
            try:
                for abandoned in folder.parent.glob(f".iter_*{WRITING}*"):
                    shutil.rmtree(abandoned, ignore_errors=True)
                folder.mkdir(parents=True)
            except OSError as error:
                failure = str(error)
        self._stop_if_any(failure)

    def _publish(self, temporary: Path, final: Path, record: dict[str, Any], writes: bool) -> None:
        """Complete the folder after every rank has written its files, rename it, and record it as the newest."""
        files: Files = {}
        if writes and not self._failures:
            try:
                files = take_records(temporary, device.rank())
            except (OSError, ValueError) as error:
                self._failures.append(f"no record of the files it wrote: {error}")
        self._stop_if_any("; ".join(self._failures) or None)
        everyones = gather(files)
        failure = None
        if device.rank() == 0:
            try:
                write_atomically(temporary / CONFIG, json.dumps(record, indent=1, default=str))
                write_format(temporary)
                files = {name: entry for part in everyones for name, entry in part.items()}
                rest = [path.name for path in temporary.iterdir() if path.name not in files]
                write_manifest(temporary, files | describe(temporary, rest))
                delete_checkpoint(final, ignore_errors=True)
                os.replace(temporary, final)
                write_atomically(final.parent / TRACKER, f"{record['resolved']['iteration']}\n")
            except OSError as error:
                failure = str(error)
        self._stop_if_any(failure)
        if device.rank() == 0:
            self._prune(final)

    def _stop_if_any(self, failure: str | None) -> None:
        """Raise ``SaveFailed`` on every rank if any rank passes the reason for a failure; None means success."""
        reason = first_failure(failure)
        if reason is None:
            return
        assert self._writing is not None
        if device.rank() == 0:
            shutil.rmtree(self._writing, ignore_errors=True)
        name = self._writing.name.removeprefix(".").partition(WRITING)[0]
        raise SaveFailed(
            f"checkpoint {name} could not be written, older ones are as they were: {reason} "
            f"({free_space(self._writing.parent)} free now)"
        )

    def _prune(self, newest: Path) -> None:
        """Delete all but the last --keep-last checkpoints up to ``newest`` and the multiples of --save-retain-interval.

        Checkpoints after ``newest`` belong to another continuation of the run and are kept.
        """
        settings = self.run.checkpoint
        if settings.keep_last is None:
            return
        older = [i for i in saved_iterations(newest.parent) if folder_of(newest.parent, i).name <= newest.name]
        retained = multiples(older, settings.save_retain_interval)
        for iteration in older[: -settings.keep_last]:
            if iteration not in retained:
                delete_checkpoint(folder_of(newest.parent, iteration), ignore_errors=True)

    def _record(self) -> dict[str, Any]:
        """Return the content of ``run_config.json``: the settings, the values resolved from them, and the progress."""
        state = self.state.to_dict()  # a copy, because it may be written while training continues
        progress = {name: state[name] for name in ("iteration", "consumed_samples", "consumed_tokens", "turns")}
        return cli.to_dict(self.run) | {"resolved": self.resolved | progress}

    def _state_dict(self) -> dict[str, Any]:
        replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        model_state = share_among_replicas(self._model_state(), replicas)
        state = weights_to_save(model_state)
        if not self.run.checkpoint.no_save_optim:
            if held := state_to_save(self.optimizer, model_state):  # omitted if empty: the other ranks have none
                state["optimizer"] = held
            state["optimizer_step"] = largest(
                current_step(self.optimizer)
            )  # ranks without optimizer state have no step
            if (scale := shared_loss_scale(self.optimizer)) is not None:
                state["grad_scaler"] = [scale.state_dict()]
        random_states = {} if self.run.checkpoint.no_save_rng else {"rng": rng_state()}
        return state | {"train_state": self.state.to_dict()} | random_states

    def _model_state(self) -> dict[str, Any]:
        """Return the sharded state of every chunk; quantisation state only with delayed FP8 scaling."""
        chunks = {f"model{i}": sharded_state(module) for i, module in enumerate(self.model.modules)}
        if self.model.config.fp8 and self.model.config.fp8_recipe == "delayed":
            return chunks
        return {
            name: {key: entry for key, entry in chunk.items() if not is_scales(key)} for name, chunk in chunks.items()
        }

    def load(self, checkpoint: Path) -> None:
        """Restore weights and, except with --finetune, optimizer, random states and progress.

        --no-load-optim and --no-load-rng leave out the optimizer and random states. A checkpoint that the finetuning
        run itself has saved is restored completely. No code in the checkpoint is executed. Raises ``ValueError`` on
        every rank, naming the file, if any rank cannot read it.
        """
        finetune = takes_weights_only(self.run, checkpoint)
        reader = open_checkpoint(checkpoint)
        saved = SavedWeights(reader.index)
        self._load_weights(checkpoint, reader, saved, may_lack=EXIT_GATE if finetune else None)
        moments = () if finetune or self.run.checkpoint.no_load_optim else saved.kinds(MOMENTS)
        request: dict[str, Any] = {"optimizer": state_to_load(self.optimizer, self._model_state(), saved, moments)}
        if not finetune:
            request["rng"] = {} if self.run.checkpoint.no_load_rng else _rng_to_load(reader)
        loaded = read_sharded(request, checkpoint, reader)
        # Loading has replaced the parameters in the request by tensors, so the names are taken from a new state.
        restore_state(self.optimizer, self._model_state(), loaded.get("optimizer", {}))
        if moments:
            set_step(self.optimizer, loaded["optimizer_step"])
            self._restore_loss_scale(loaded.get("grad_scaler", []))
        if not finetune:
            for name, value in loaded["train_state"].items():
                setattr(self.state, name, value)
            if request["rng"]:
                restore_rng(loaded["rng"])

    def _load_weights(
        self, checkpoint: Path, reader: SafeReader, saved: SavedWeights, may_lack: str | None = None
    ) -> None:
        """Load the model's weights; those whose names begin with ``may_lack`` keep their initial values if missing."""
        model_state, keys = self._model_state(), set(reader.index.state_dict_metadata)
        wanted = without_slices(without_missing_scales(model_state, keys))
        new = {name for chunk in wanted.values() for name in chunk if may_lack and name.startswith(may_lack)} - keys
        wanted = {chunk: {n: entry for n, entry in has.items() if n not in new} for chunk, has in wanted.items()}
        loaded = read_sharded(saved.requests(wanted), checkpoint, reader)
        stop_reading_if_any(foreign_scales(loaded, checkpoint))
        for i, module in enumerate(self.model.modules):
            # A later loop of the ring owns no weights, and Megatron-Core drops empty entries.
            left = module.load_state_dict(loaded.get(f"model{i}", {}), strict=False)
            sliced = {name for name, entry in model_state[f"model{i}"].items() if is_slice(entry)}  # restore_state
            kept = sliced | new
            missing = [name for name in left.missing_keys if not is_scales(name) and name not in kept]
            if missing or left.unexpected_keys:
                raise RuntimeError(f"{checkpoint}: missing {missing}, unexpected {left.unexpected_keys}")

    def _restore_loss_scale(self, saved: list[dict[str, Any]]) -> None:
        """Restore the dynamic loss scale from ``saved``.

        ``saved`` is [] if the run had no loss scale and [{}] if it was constant. Older checkpoints hold one scale per
        sub-optimizer; the loss was multiplied by the first.
        """
        scale = shared_loss_scale(self.optimizer)
        if scale is not None and saved and saved[0]:
            scale.load_state_dict(saved[0])


def _rng_to_load(reader: SafeReader) -> dict[str, ShardedTensor]:
    """Return the random states to load: none unless as many ranks saved them, in the same shapes.

    A state belongs to one rank, and its shape depends on the kind of device.
    """
    states = rng_state()
    entries = reader.index.state_dict_metadata
    alike = all(tuple(getattr(entries.get(s.key), "size", ())) == tuple(s.global_shape) for s in states.values())
    return states if alike else {}
