"""Pretrain MeSH and other recursive transformers: torchrun --nproc-per-node N pretrain_mesh.py [flags]."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

from mesh_megatron.checkpoint.folder import SaveFailed
from mesh_megatron.config import cli
from mesh_megatron.config.megatron_flags import ignored_for_speed
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.without_effect import settings_without_effect
from mesh_megatron.planning.summary import RunSummary, summary_of
from mesh_megatron.platform.launcher import end_with_launcher, place_in_job, refusals_reported, report_refusal
from mesh_megatron.training.fault_tolerance.run_status import (
    REFUSED_EXIT_CODE,
    WRONG_NUMBERS_EXIT_CODE,
    note_refusal,
    restarted_in_vain,
)
from mesh_megatron.training.fault_tolerance.save_lock import is_locked
from mesh_megatron.training.fault_tolerance.signals import SignalListener
from mesh_megatron.util.atomic_files import prepare_file, write_atomically
from mesh_megatron.util.terminal_log import log_to_terminal

logger = logging.getLogger(__name__)


def main(args: Sequence[str] | None = None) -> int:
    """Train, evaluate or plan as ``args`` (default the command line) say; return the exit code."""
    end_with_launcher()
    with refusals_reported():
        run = cli.parse_run(RunConfig, PRESETS, args)
    try:
        rank, ranks = place_in_job(alone=run.dry_run)
    except ValueError as error:
        _refuse(error)
        return REFUSED_EXIT_CODE
    with log_to_terminal(rank, run.logging.logging_level):
        if ignored := ignored_for_speed(sys.argv[1:] if args is None else args):
            logger.info(f"no effect here    {', '.join(ignored)} (docs/megatron.md)")
        if run.dry_run:
            return start(run, rank, run.world_size or ranks, None)
        signals = SignalListener()
        try:
            return start(run, rank, ranks, signals)
        finally:
            signals.close()


def start(run: RunConfig, rank: int, world_size: int, signals: SignalListener | None) -> int:
    """Check and report the settings, then train unless ``signals`` is None (--dry-run); return the exit code."""
    try:
        if run.world_size is not None and not run.dry_run:
            raise ValueError(
                f"--world-size {run.world_size} is only for --dry-run: drop it, as torchrun sets the number of ranks"
            )
        run.validate(world_size)
        vocabulary = padded_vocabulary(run)
        summary = summary_of(run, vocabulary, world_size)
        if rank == 0:
            report(run, summary)
        if signals is None:
            return 0
        from mesh_megatron.platform import device

        device.prepare()
        from mesh_megatron.training.pretrain import preflight, pretrain

        if rank == 0:
            if run.checkpoint.save is not None and (reason := restarted_in_vain(run.checkpoint.save)) is not None:
                _refuse(reason)
                return WRONG_NUMBERS_EXIT_CODE
            preflight(run, vocabulary)
        return pretrain(run, vocabulary, summary, signals)
    except ValueError as error:
        _refuse(error)
        trains = rank == 0 and signals is not None and not run.training.eval_only
        if trains and run.checkpoint.save is not None and not is_locked(run.checkpoint.save):
            note_refusal(run.checkpoint.save, str(error))
        return REFUSED_EXIT_CODE
    except SaveFailed as error:
        if rank == 0:
            cli.print_error(f"the last {error}")
        return 1


def _refuse(reason: object) -> None:
    report_refusal(f"{cli.program()}: error: {reason}")


def padded_vocabulary(run: RunConfig) -> int:
    """Return the number of rows of the embedding, from --padded-vocab-size or the tokenizer.

    Raises ``ValueError`` if it does not divide by the number of tensor-parallel ranks.
    """
    planned = run.model.padded_vocab_size if run.dry_run else None
    rows = _rows_for_tokenizer(run) if planned is None else planned
    run.parallel.validate_vocabulary(rows)
    return rows


def _rows_for_tokenizer(run: RunConfig) -> int:
    from mesh_megatron.platform import device

    device.prepare()
    from mesh_megatron.data import tokenizers

    tokenizer = tokenizers.from_config(run.data)
    return run.model.padded_vocabulary(tokenizer.vocab_size if tokenizer is not None else None)


def report(run: RunConfig, summary: RunSummary) -> None:
    """Print the settings (not with --dry-run), warnings and the summary, and write the file of --summary-json."""
    for line in settings_without_effect(run):
        logger.warning(line)
    if run.dry_run:
        print(summary.to_text())
    else:
        logger.info(json.dumps(cli.to_dict(run), indent=1, default=str))
        logger.info(summary.to_text())
    if run.summary_json is not None:
        prepare_file(run.summary_json, "--summary-json")
        write_atomically(run.summary_json, json.dumps(summary.to_dict(), indent=1) + "\n")
