"""A training run on this rank, from its settings to its exit code."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from mesh_megatron.checkpoint.compatibility import check_same_model
from mesh_megatron.checkpoint.folder import CheckpointChoice, find_checkpoint
from mesh_megatron.config.run import RunConfig
from mesh_megatron.data import tokenizers
from mesh_megatron.data.batches import BatchShard, MicroBatches
from mesh_megatron.data.datasets import SampleCounts, build_datasets
from mesh_megatron.data.fingerprint import data_files
from mesh_megatron.data.ranks import rank_zero_first
from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.model.cross_entropy import resolve_loss_kernel
from mesh_megatron.model.kernels.availability import check_fused_kernels
from mesh_megatron.model.memory_op import resolve_memory_kernel
from mesh_megatron.parallel.build_model import build_model, resolve_implementation
from mesh_megatron.parallel.collectives import gather
from mesh_megatron.parallel.fp8_support import check_fp8
from mesh_megatron.parallel.groups import (
    check_backend,
    data_parallel,
    on_first_stage,
    on_last_stage,
    start_model_parallel,
    stop_model_parallel,
)
from mesh_megatron.planning.flops import training_flops_per_token
from mesh_megatron.planning.summary import RunSummary
from mesh_megatron.platform import device
from mesh_megatron.platform.launcher import under_torchrun
from mesh_megatron.training.callbacks.bad_steps import BadSteps
from mesh_megatron.training.callbacks.checkpointing import Checkpointing
from mesh_megatron.training.callbacks.early_exit import EarlyExit
from mesh_megatron.training.callbacks.evaluation import Evaluation
from mesh_megatron.training.callbacks.garbage_collection import GarbageCollection
from mesh_megatron.training.callbacks.hang_watchdog import Watchdog
from mesh_megatron.training.callbacks.heartbeat import Heartbeat
from mesh_megatron.training.callbacks.logging import Logging
from mesh_megatron.training.callbacks.mesh_probes import MeshProbes
from mesh_megatron.training.callbacks.profiling import Profiling
from mesh_megatron.training.callbacks.replica_check import ReplicaCheck
from mesh_megatron.training.callbacks.step_times import StepTimes
from mesh_megatron.training.callbacks.stragglers import Stragglers
from mesh_megatron.training.callbacks.throughput import StepClock
from mesh_megatron.training.checkpointer import Checkpointer
from mesh_megatron.training.fault_tolerance.rank_consistency import check_rank_consistency
from mesh_megatron.training.fault_tolerance.resume_diff import changes_since
from mesh_megatron.training.fault_tolerance.run_status import STOPPED_EARLY_EXIT_CODE
from mesh_megatron.training.fault_tolerance.save_lock import hold_save_lock
from mesh_megatron.training.fault_tolerance.signals import SignalListener
from mesh_megatron.training.lr_schedule import build_schedule
from mesh_megatron.training.metrics.wandb import check_wandb
from mesh_megatron.training.metrics.writer import MetricsWriter
from mesh_megatron.training.optimizer import build_optimizer
from mesh_megatron.training.run_length import RunLength, compute_run_length, takes_weights_only
from mesh_megatron.training.start_clock import StartClock
from mesh_megatron.training.state import TrainState
from mesh_megatron.training.trainer import Callback, RunData, Trainer

logger = logging.getLogger(__name__)


def preflight(run: RunConfig, vocabulary: int) -> None:
    """Check everything that this rank can check alone; raise ``ValueError`` naming the flag, the value and the fix."""
    device.check_gpus()
    memory = resolve_memory_kernel(run.model.memory_kernel, device.device())
    loss = resolve_loss_kernel(run.model.loss_kernel, device.device())
    rotary = resolve_implementation(run) == "local" and not run.parallel.no_rope_fusion
    if rotary or "fused" in (memory, loss):
        check_fused_kernels(device.device())
    if run.checkpoint.save is not None:
        _check_writable(run.checkpoint.save)
    check_backend(run)
    check_fp8(run)
    check_wandb(run.logging.wandb_project)
    checkpoint = find_checkpoint(run).folder
    if checkpoint is None and run.model.exit_gate_only:
        raise ValueError(
            "--exit-gate-only without a checkpoint: all weights but the gate's would stay as they were drawn; give "
            "--load, with --finetune if its model has no gate"
        )
    if checkpoint is not None:
        check_same_model(checkpoint, run.model, vocabulary, takes_weights_only(run, checkpoint))


def pretrain(run: RunConfig, vocabulary: int, summary: RunSummary, signals: SignalListener) -> int:
    """Train (or with --eval-only evaluate) according to ``run`` and return the exit code of this process.

    Every rank calls this after validating ``run`` and preparing ``megatron.core`` (see ``platform``). Raises ``InUse``
    if another run writes to --save.
    """
    save = run.checkpoint.save if device.rank() == 0 and not run.training.eval_only else None
    with hold_save_lock(save) if save is not None else contextlib.nullcontext():
        return _pretrain(run, vocabulary, summary, signals, save)


def _pretrain(run: RunConfig, vocabulary: int, summary: RunSummary, signals: SignalListener, save: Path | None) -> int:
    """Train inside the save lock; ``save`` is None except on the rank that writes to it."""
    random.seed(run.training.seed)
    np.random.seed(run.training.seed)
    if run.training.deterministic_mode:
        device.add_in_fixed_order()
    if run.training.disable_bf16_reduced_precision_matmul:
        device.add_products_in_float32()
    clock = StartClock(signals.started)
    device.start_process_group(run.parallel.distributed_backend, run.parallel.distributed_timeout_minutes)
    logger.info(f"device            {device.device_name()}, {dist.get_backend()}, {device.world_size()} ranks")
    watchdog = Watchdog(run.parallel.distributed_timeout_minutes, clock)
    heartbeat = None
    writer = MetricsWriter(run) if device.rank() == 0 else None
    try:
        check_rank_consistency(run)
        start_model_parallel(run)
        if save is not None:
            heartbeat = Heartbeat(save)
        trainer = _build_trainer(run, vocabulary, summary, signals, writer, heartbeat, watchdog)
        logger.info(clock.report())
        _train(run, trainer, writer, watchdog)
        dist.barrier()
        if heartbeat is not None:
            heartbeat.end(trainer)
        code = _exit_code(run, trainer)
        watchdog.stop()
        _leave()
    except BaseException as error:
        if heartbeat is not None:
            heartbeat.fail(error)
        _end_children()
        watchdog.stop()
        # Destroying NCCL groups waits for the other ranks, which may be waiting for this process to end.
        if device.world_size() == 1:
            _leave()
        raise
    if writer is not None:
        writer.close()  # last, so that no rank waits while Weights & Biases sends its remaining records
    return code


def _end_children() -> None:
    """Kill data workers: they ignore SIGTERM, so Python would block at exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each of them
    for child in multiprocessing.active_children():
        child.kill()


def _leave() -> None:
    stop_model_parallel()
    dist.destroy_process_group()


def _train(run: RunConfig, trainer: Trainer, writer: MetricsWriter | None, watchdog: Watchdog) -> None:
    if writer is not None:
        writer.open(trainer.state.iteration, evaluated=not trainer.state.evaluation_due)
    if run.training.eval_only:
        watchdog.enter("evaluating")
        next(callback for callback in trainer.callbacks if isinstance(callback, Evaluation)).evaluate(trainer)
    else:
        try:
            trainer.train()
        except ValueError as error:  # a ValueError raised before training means bad settings
            raise RuntimeError(f"training failed in step {trainer.state.iteration + 1}: {error}") from error
    if trainer.stop_reason is not None:
        logger.info(f"stopped at iteration {trainer.state.iteration}: {trainer.stop_reason}")


def _exit_code(run: RunConfig, trainer: Trainer) -> int:
    """Return the trainer's exit code, or 75 if the run stopped early; torchrun would treat 75 as a crash."""
    complete = not trainer.state.evaluation_due if run.training.eval_only else trainer.finished
    if trainer.failed or complete or under_torchrun():
        return trainer.exit_code
    return STOPPED_EARLY_EXIT_CODE


def _build_trainer(
    run: RunConfig,
    vocabulary: int,
    summary: RunSummary,
    signals: SignalListener,
    writer: MetricsWriter | None,
    heartbeat: Heartbeat | None,
    watchdog: Watchdog,
) -> Trainer:
    tokenizer = tokenizers.from_config(run.data)
    source = _agreed_checkpoint(run, watchdog)
    length = compute_run_length(run, device.world_size(), source)
    watchdog.enter("indexing data")
    data = _build_data(run, vocabulary, tokenizer, length)
    watchdog.enter("building the model")
    model = build_model(run, vocabulary)
    optimizer = build_optimizer(run, model)
    schedule = build_schedule(run, optimizer, length)
    state = TrainState()
    resolved = _resolved(run, vocabulary, tokenizer) | {"order_samples": length.order_samples}
    checkpointer = Checkpointer(run, model, optimizer, state, resolved)
    if source is not None:
        watchdog.enter("loading the checkpoint")
        checkpointer.load(source)
        if device.rank() == 0:
            logger.info(f"continuing from {source} at iteration {state.iteration} of {length.total_iters}")
            for change in changes_since(source, run, resolved) if not takes_weights_only(run, source) else ():
                logger.info(f"changed since then: {change}")
    callbacks = _callbacks(run, writer, summary, checkpointer, signals, heartbeat, watchdog)
    return Trainer(
        run=run,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        data=data,
        state=state,
        callbacks=callbacks,
        total_iters=length.total_iters,
        data_parallel_size=data_parallel()[1],
    )


def _agreed_checkpoint(run: RunConfig, watchdog: Watchdog) -> Path | None:
    """Return the checkpoint that rank 0 chooses to start from, with a warning if it is not the newest."""

    def find() -> CheckpointChoice:
        return find_checkpoint(run, run.checkpoint.verify_checkpoint) if device.rank() == 0 else CheckpointChoice()

    # Only rank 0 decides. The others do not wait in a collective, because reading all files may take long.
    watchdog.enter("finding a checkpoint")
    choice = gather(rank_zero_first(find, "find a checkpoint to start from"))[0]
    if device.rank() == 0:
        for warning in choice.warnings:
            logger.warning(warning)
    return choice.folder


def _callbacks(
    run: RunConfig,
    writer: MetricsWriter | None,
    summary: RunSummary,
    checkpointer: Checkpointer,
    signals: SignalListener,
    heartbeat: Heartbeat | None,
    watchdog: Watchdog,
) -> list[Callback]:
    exits = EarlyExit(signals)
    callbacks: list[Callback] = [watchdog]
    if run.logging.profile and device.rank() in run.logging.profile_ranks:
        callbacks.append(Profiling(run))
    if run.training.manual_gc or run.training.manual_gc_interval:
        callbacks.append(GarbageCollection(run.training.manual_gc_interval))
    # Checkpoints come last, so that every step a checkpoint contains has been logged and evaluated.
    rows = summary.vocabulary_rows

    def flops(loops: int) -> int:
        model, learned = run.at_loops(loops).model, run.loops.backprop_loops
        return training_flops_per_token(model, rows, backprop_loops=learned).total

    callbacks += [exits, StepClock(), BadSteps(writer), Logging(writer, flops)]
    if run.logging.timing_log_level:
        callbacks.append(StepTimes(writer, run.logging))
    if run.logging.outlier_factor:  # before evaluations and checkpoints, whose time does not count
        callbacks.append(Stragglers(run.logging.outlier_factor))
    if (interval := run.training.check_weight_hash_across_dp_replicas_interval) is not None:
        callbacks.append(ReplicaCheck(interval))
    if run.logging.probe_interval is not None:
        callbacks.append(MeshProbes(writer, run.logging.probe_interval))
    callbacks.append(Evaluation(writer, exits))
    if run.checkpoint.save is not None:
        callbacks.append(Checkpointing(checkpointer, writer if run.logging.log_timers_to_tensorboard else None))
    if heartbeat is not None:
        callbacks.append(heartbeat)
    return callbacks


def _build_data(run: RunConfig, vocabulary: int, tokenizer: Tokenizer | None, length: RunLength) -> RunData:
    training = run.training
    rank, ranks = data_parallel()
    shard = BatchShard(micro_batch_size=training.micro_batch_size, data_parallel_rank=rank, data_parallel_size=ranks)
    evaluated = training.eval_iters * training.batch_size(ranks)
    counts = SampleCounts(
        train=0 if training.eval_only else length.samples,
        valid=evaluated,
        test=evaluated,
        train_order=length.order_samples,
    )
    datasets = build_datasets(
        run.data,
        counts,
        seq_length=run.model.seq_length,
        seed=training.seed,
        tokenizer=tokenizer,
        vocab_size=vocabulary,
    )
    reads = on_first_stage() or on_last_stage() or run.data.reset_attention_mask

    def stream(samples: Any, wrap: bool) -> MicroBatches | None:
        if samples is None or not reads:
            return None
        return MicroBatches(samples, shard, num_workers=run.data.num_workers, wrap=wrap, pin_memory=device.has_gpu())

    valid = {name: stream(samples, wrap=True) for name, samples in datasets.valid.items()}
    return RunData(
        stream(datasets.train, wrap=False), valid, stream(datasets.test, wrap=True), datasets.test is not None
    )


def _resolved(run: RunConfig, vocabulary: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {
        "global_batch_size": run.training.batch_size(data_parallel()[1]),
        "data_files": data_files(run.data),
        "padded_vocab_size": vocabulary,
        "tokenizer_vocab_size": tokenizer.vocab_size if tokenizer is not None else None,
        "eod_id": tokenizer.eod if tokenizer is not None else None,
    }


def _check_writable(save: Path) -> None:
    try:
        save.mkdir(parents=True, exist_ok=True)
        probe = save / f".writable.{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--save {save} cannot be written: {error.strerror}; name a folder that can") from error
