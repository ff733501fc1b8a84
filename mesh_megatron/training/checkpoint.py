"""Checkpoints: whole or absent, and independent of the layout of ranks.

``SAVE/iter_0000100/`` holds Megatron-Core's distributed checkpoint (PyTorch's format), ``run_config.json``, all that
tools need to know, and ``manifest.json``. It is written under a temporary name and renamed when every rank is done;
then ``latest_checkpointed_iteration.txt`` names it. No two attempts share a temporary name: writers of a rank that was
killed may still be at work.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from mesh_megatron.config import cli
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.parallel.place import PlacedModel
from mesh_megatron.parallel.shard_reading import reading_with
from mesh_megatron.parallel.shard_writing import request_save, share_among_replicas, write_format
from mesh_megatron.platform import device
from mesh_megatron.training.agreement import first_failure, gather, largest
from mesh_megatron.training.background_writes import BackgroundWrites
from mesh_megatron.training.checkpoint_folder import (
    CONFIG,
    TRACKER,
    WRITING,
    SaveFailed,
    folder_of,
    multiples,
    read_run_config,
    saved_iterations,
)
from mesh_megatron.training.durable import write_durably
from mesh_megatron.training.exact_weights import SavedWeights
from mesh_megatron.training.file_records import take_records, write_and_record
from mesh_megatron.training.length import starts_anew
from mesh_megatron.training.loss_scale import shared_loss_scale
from mesh_megatron.training.manifest import Files, describe, write_manifest
from mesh_megatron.training.optimizer_state import (
    MOMENTS,
    current_step,
    restore_state,
    set_step,
    state_to_load,
    state_to_save,
)
from mesh_megatron.training.safe_reading import SafeReader, cause, is_scales, read_plainly, read_scales
from mesh_megatron.training.state import TrainState

# Settings of the model that may change between two runs of one model.
_FREE_MODEL_FIELDS = (
    "seq_length",
    "max_position_embeddings",
    "router_init",
    "router_bias",
    "init_method_std",
    "padded_vocab_size",  # compared as the rows it resolves to
    "make_vocab_size_divisible_by",
    "memory_kernel",
    "loss_kernel",
    "loss_chunk_tokens",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
)


def check_same_model(checkpoint: Path, model: ModelConfig, vocabulary: int) -> None:
    """Raise ``ValueError`` naming every field in which the checkpoint's model is another one."""
    record = read_run_config(checkpoint)
    saved = cli.from_dict(ModelConfig, record["model"], str(checkpoint))
    differences = []
    if (rows := record["resolved"]["padded_vocab_size"]) != vocabulary:
        differences.append(f"vocabulary rows {rows} there, {vocabulary} here")
    theirs, ours = (_comparable(config) for config in (saved, model))
    differences += [f"{name} {theirs[name]} there, {ours[name]} here" for name in ours if theirs[name] != ours[name]]
    if differences:
        raise ValueError(f"{checkpoint} holds another model: {'; '.join(differences)}")


def _comparable(config: ModelConfig) -> dict[str, Any]:
    fields = {name: value for name, value in cli.to_dict(config).items() if name not in _FREE_MODEL_FIELDS}
    defaults = {
        "layout": str(config.segments),
        "num_memory_slots": config.memory_slots if config.scheme == "mesh" else None,
        "ffn_hidden_size": config.ffn_size,
        "num_query_groups": config.query_groups,
        "kv_channels": config.head_size,
        "moe_ffn_hidden_size": config.expert_ffn_size,
    }
    return fields | defaults


class Checkpointer:
    """Saves and restores everything that one run is."""

    def __init__(
        self,
        run: RunConfig,
        model: PlacedModel,
        optimizer: MegatronOptimizer,
        state: TrainState,
        resolved: dict[str, Any],
    ) -> None:
        """``resolved`` holds what tools need beyond the settings, such as the padded vocabulary."""
        self.run, self.model, self.optimizer, self.state, self.resolved = run, model, optimizer, state, resolved
        self._queue = BackgroundWrites() if run.checkpoint.async_save else None
        self._writing: Path | None = None
        self._failures: list[str] = []
        """Of this rank, at the newest checkpoint."""

    def save(self) -> None:
        """Write a checkpoint of this iteration; with --async-save only copy, and write while training goes on.

        Raises ``SaveFailed`` on every rank if one of them cannot write, here or when the background write is done.
        Nothing of it is left then, and older checkpoints are as they were.
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
            self._stop_if_any(_reason(error))

    def finish_pending(self, wait: bool = False) -> None:
        """Publish a background write that is done; with ``wait`` wait for it. ``SaveFailed`` as in ``save``."""
        if self._queue is None:
            return
        try:
            self._queue.maybe_finalize_async_calls(blocking=wait)
        except CheckpointException as error:
            self._stop_if_any("; ".join(self._failures) or None)  # who could not begin knows better than rank 0
            self._stop_if_any(_reason(error))

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
        """Every rank has written its part: complete the folder, give it its name, and name it the newest."""
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
                write_durably(temporary / CONFIG, json.dumps(record, indent=1, default=str))
                write_format(temporary)
                files = {name: entry for part in everyones for name, entry in part.items()}
                rest = [path.name for path in temporary.iterdir() if path.name not in files]
                write_manifest(temporary, files | describe(temporary, rest))
                shutil.rmtree(final, ignore_errors=True)
                os.replace(temporary, final)
                write_durably(final.parent / TRACKER, f"{record['resolved']['iteration']}\n")
            except OSError as error:
                failure = str(error)
        self._stop_if_any(failure)
        if device.rank() == 0:
            self._prune(final)

    def _stop_if_any(self, failure: str | None) -> None:
        """Every rank says why it cannot go on with the checkpoint, or None; if one cannot, none does."""
        reason = first_failure(failure)
        if reason is None:
            return
        assert self._writing is not None
        if device.rank() == 0:
            shutil.rmtree(self._writing, ignore_errors=True)
        name = self._writing.name.removeprefix(".").partition(WRITING)[0]
        raise SaveFailed(
            f"checkpoint {name} could not be written, older ones are as they were: {reason} "
            f"({_free_space(self._writing.parent)} free now)"
        )

    def _prune(self, newest: Path) -> None:
        """Keep --keep-last checkpoints up to ``newest`` and the multiples of --save-retain-interval.

        What lies beyond ``newest`` is of a run that went another way.
        """
        settings = self.run.checkpoint
        if settings.keep_last is None:
            return
        older = [i for i in saved_iterations(newest.parent) if folder_of(newest.parent, i).name <= newest.name]
        retained = multiples(older, settings.save_retain_interval)
        for iteration in older[: -settings.keep_last]:
            if iteration not in retained:
                shutil.rmtree(folder_of(newest.parent, iteration), ignore_errors=True)

    def _record(self) -> dict[str, Any]:
        """What ``run_config.json`` says: the settings, and what they and the run so far came to."""
        state = self.state.to_dict()  # a copy: it may be written while training goes on
        progress = {name: state[name] for name in ("iteration", "consumed_samples", "consumed_tokens", "turns")}
        return cli.to_dict(self.run) | {"resolved": self.resolved | progress}

    def _state_dict(self) -> dict[str, Any]:
        replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        state: dict[str, Any] = share_among_replicas(self._model_state(), replicas)
        if not self.run.checkpoint.no_save_optim:
            if held := state_to_save(self.optimizer, state):  # an empty entry would differ from the other ranks'
                state["optimizer"] = held
            state["optimizer_step"] = largest(current_step(self.optimizer))  # some ranks hold none
            if (scale := shared_loss_scale(self.optimizer)) is not None:
                state["grad_scaler"] = [scale.state_dict()]
        return state | {"train_state": self.state.to_dict(), "rng": _rng_state()}

    def _model_state(self) -> dict[str, Any]:
        """Sharded state of every chunk, without the quantisation state that only delayed FP8 scaling has."""
        chunks = {f"model{i}": module.sharded_state_dict() for i, module in enumerate(self.model.modules)}
        if self.model.config.fp8 and self.model.config.fp8_recipe == "delayed":
            return chunks
        return {
            name: {key: entry for key, entry in chunk.items() if not is_scales(key)} for name, chunk in chunks.items()
        }

    def load(self, checkpoint: Path) -> None:
        """Restore weights and, but for --finetune, optimizer, random state and progress.

        A checkpoint of the finetuning run itself is continued. Runs no code that lies in the checkpoint;
        ``ValueError`` on every rank, naming the file, if one cannot be read.
        """
        finetune = starts_anew(self.run, checkpoint)
        reader = _open(checkpoint)
        saved = SavedWeights(reader.index)
        self._load_weights(checkpoint, reader, saved)
        moments = () if finetune else saved.kinds(MOMENTS)
        request: dict[str, Any] = {"optimizer": state_to_load(self.optimizer, self._model_state(), saved, moments)}
        if not finetune:
            request["rng"] = _rng_to_load(reader)
        loaded = _read(request, checkpoint, reader)
        # Loading has put tensors in place of the parameters in what was asked for: name them again.
        restore_state(self.optimizer, self._model_state(), loaded.get("optimizer", {}))
        if moments:
            set_step(self.optimizer, loaded["optimizer_step"])
            self._restore_loss_scale(loaded.get("grad_scaler", []))
        if not finetune:
            for name, value in loaded["train_state"].items():
                setattr(self.state, name, value)
            if request["rng"]:
                _restore_rng(loaded["rng"])

    def _load_weights(self, checkpoint: Path, reader: SafeReader, saved: SavedWeights) -> None:
        wanted = _without_missing_scales(self._model_state(), set(reader.index.state_dict_metadata))
        loaded = _read(saved.requests(wanted), checkpoint, reader)
        _stop_reading_if_any(_foreign_scales(loaded, checkpoint))
        for i, module in enumerate(self.model.modules):
            # A later loop of the ring owns no weights, and the library drops what is empty.
            left = module.load_state_dict(loaded.get(f"model{i}", {}), strict=False)
            missing = [name for name in left.missing_keys if not is_scales(name)]
            if missing or left.unexpected_keys:
                raise RuntimeError(f"{checkpoint}: missing {missing}, unexpected {left.unexpected_keys}")

    def _restore_loss_scale(self, saved: list[dict[str, Any]]) -> None:
        """``saved`` is empty of a run without one, and what it holds of a constant one; older checkpoints have one a
        part of the optimizer, first the one that the loss was multiplied by."""
        scale = shared_loss_scale(self.optimizer)
        if scale is not None and saved and saved[0]:
            scale.load_state_dict(saved[0])


def _open(checkpoint: Path) -> SafeReader:
    """What each rank reads for itself, before they read tensors together; all ranks raise if one cannot."""
    failure = reader = None
    try:
        reader = SafeReader(checkpoint)
        if (common := checkpoint / "common.pt").exists():
            read_plainly(common)  # as Megatron-Core will read it only if the environment allows
    except (ValueError, OSError) as error:
        failure = str(error)
    _stop_reading_if_any(failure)
    assert reader is not None
    return reader


def _stop_reading_if_any(failure: str | None) -> None:
    if (reason := first_failure(failure)) is not None:
        raise ValueError(f"{reason}; another checkpoint can be named with --ckpt-step")


def _read(request: dict[str, Any], checkpoint: Path, reader: SafeReader) -> dict[str, Any]:
    failure = None
    try:
        with reading_with(lambda folder: reader):
            loaded = dist_checkpointing.load(request, str(checkpoint), validate_access_integrity=False)
    except CheckpointException as error:
        failure = cause(error) if error.failures else "reading failed"
    except ValueError as error:
        failure = str(error)
    _stop_reading_if_any(failure)
    return loaded


def _foreign_scales(loaded: dict[str, Any], checkpoint: Path) -> str | None:
    """What is wrong with the quantisation state: loading it into a module unpickles it."""
    for entries in loaded.values():
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if is_scales(key) and isinstance(value, torch.Tensor):
                try:
                    read_scales(value)
                except ValueError as error:
                    return f"{checkpoint}: {key} cannot be read: {error}"
    return None


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"
    except OSError as error:  # of a disk that has gone away
        return f"space unknown, {error.strerror}:"


def _reason(error: CheckpointException) -> str:
    """Why tensors could not be written: rank 0 knows, for all ranks."""
    return "; ".join(f"writing on rank {rank}: {_in_words(inner[0])}" for rank, inner in error.failures.items())


def _in_words(error: BaseException) -> str:
    text = str(error).removeprefix("Worker failure: ")
    return f"a file was cut short ({text})" if "unexpected pos" in text else text  # torch.save hides the system's error


def _without_missing_scales(chunks: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """What to ask a checkpoint that holds ``keys`` for: FP8 scaling starts anew where the run before had none."""
    if not any(is_scales(key) for chunk in chunks.values() for key in chunk):
        return chunks
    known = {key.rpartition("/shard_")[0] or key for key in keys}
    return {
        name: {key: entry for key, entry in chunk.items() if not is_scales(key) or entry.key in known}
        for name, chunk in chunks.items()
    }


def _rng_state() -> dict[str, ShardedTensor]:
    """Every rank's random states, one row a rank, under a name that says how many ranks there are."""
    states = {"cpu": torch.get_rng_state(), "device": device.rng_state()}
    states |= {f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    ranks, rank = device.world_size(), device.rank()
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{ranks}.{name}", state.unsqueeze(0), (0, rank, ranks))
        for name, state in states.items()
        if isinstance(state, torch.Tensor)
    }


def _rng_to_load(reader: SafeReader) -> dict[str, ShardedTensor]:
    """Requests; none unless as many ranks saved (states are theirs), on devices of this kind (and of one form)."""
    states = _rng_state()
    entries = reader.index.state_dict_metadata
    alike = all(tuple(getattr(entries.get(s.key), "size", ())) == tuple(s.global_shape) for s in states.values())
    return states if alike else {}


def _restore_rng(saved: dict[str, torch.Tensor]) -> None:
    states = {name: state.squeeze(0).contiguous() for name, state in saved.items()}
    torch.set_rng_state(states["cpu"])
    device.set_rng_state(states["device"])
    tracker = get_cuda_rng_tracker()
    tracked = {name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")}
    tracker.set_states(tracker.get_states() | tracked)
