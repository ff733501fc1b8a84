"""The ``--save`` folder: its file names, and the choice of the checkpoint to start from. Needs no Megatron-Core."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mesh_megatron.checkpoint.manifest import Verification, find_damage
from mesh_megatron.config.checkpoint import CheckpointConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.util.atomic_files import write_atomically

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = "run_config.json"
HUGGING_FACE_CONFIG = "config.json"
WRITING = ".writing-"  # in the name of a folder that is not complete


class SaveFailed(Exception):
    """A checkpoint could not be written; older checkpoints are unchanged."""


def folder_of(save: Path, iteration: int) -> Path:
    return save / f"iter_{iteration:07d}"


def saved_iterations(save: Path) -> list[int]:
    """List the iterations that have a checkpoint folder, or a link to one, oldest first."""
    folders = [path for path in save.glob("iter_*") if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(number for path in folders if folder_of(save, number := int(path.name[5:])).name == path.name)


def delete_checkpoint(folder: Path, ignore_errors: bool = False) -> None:
    """Delete a checkpoint; of a link to one, which was moved to another disk, only the link."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=ignore_errors)


def read_tracker(save: Path) -> str | None:
    """Return what the tracker of ``save`` holds, None without one; raise ``ValueError`` if it cannot be read."""
    try:
        return (save / TRACKER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{save / TRACKER} cannot be read: {error}") from error


def latest_iteration(save: Path) -> int | None:
    """Read the iteration to continue from in the tracker file; None without the file, ``ValueError`` if unreadable."""
    text = read_tracker(save)
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"{save / TRACKER} holds {text[:40]!r}, not an iteration")
    return int(text)


def read_run_config(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's training settings and, under "resolved", the values derived from them.

    Raises ``ValueError`` if the file is missing or damaged.
    """
    try:
        content = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint} is not a complete checkpoint: {CONFIG} is missing") from error
    except ValueError as error:
        raise ValueError(f"{checkpoint / CONFIG} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{checkpoint / CONFIG} is damaged: it holds no settings")
    return content


@dataclass(frozen=True)
class CheckpointChoice:
    """The checkpoint to start from (None to start from scratch), and warnings about the choice."""

    folder: Path | None = None
    warnings: tuple[str, ...] = ()


def find_checkpoint(run: RunConfig, verify: Verification = "size") -> CheckpointChoice:
    """Choose the newest intact checkpoint in --save, else the one that --load and --ckpt-step name, else none.

    --ckpt-step without a --load of another folder names a checkpoint in --save. It takes precedence over the newest one
    there until a run with the same --ckpt-step has saved a checkpoint, so that a restarted job keeps its own progress.
    Raises ``ValueError`` if the requested checkpoint is damaged, if a folder has checkpoints but no intact one, and
    with --exit-on-missing-checkpoint or --finetune if there is none.
    """
    settings = run.checkpoint
    branches = settings.load is not None and not same_folder(settings.load, settings.save)
    steps_back = settings.ckpt_step is not None and not branches
    if settings.save is not None:
        choice = newest_intact(settings.save, verify)
        if choice.folder is not None and not steps_back:
            return choice
        if choice.folder is not None and _saved_after_step_back(choice.folder, settings):
            return CheckpointChoice(choice.folder, (*choice.warnings, _already_stepped_back(choice.folder, settings)))
    source = settings.load or (settings.save if steps_back else None)
    if source is None:
        if settings.finetune:
            raise ValueError("--finetune needs --load, the folder whose weights to start from: add it or drop the flag")
        return CheckpointChoice()
    check_is_save(source)
    if settings.ckpt_step is not None:
        return CheckpointChoice(_requested(source, settings.ckpt_step, verify))
    choice = newest_intact(source, verify)
    if choice.folder is not None:
        return choice
    missing = f"--load {source}: no {TRACKER} there"
    if settings.finetune:
        raise ValueError(f"--finetune: {missing}; give the folder that a run's --save or an import's --output named")
    if settings.exit_on_missing_checkpoint:
        raise ValueError(
            f"--exit-on-missing-checkpoint: {missing}; give the folder that a run's --save named, or drop the flag"
        )
    return CheckpointChoice(None, (f"{missing}; training starts from random weights",))


def check_is_save(folder: Path) -> None:
    """Raise ``ValueError`` if --load ``folder`` is a Hugging Face model, or one checkpoint instead of their folder."""
    if (folder / HUGGING_FACE_CONFIG).is_file() and not saved_iterations(folder):
        raise ValueError(
            f"--load {folder}: is a Hugging Face model ({HUGGING_FACE_CONFIG}), not a training checkpoint; make one of "
            f"it: tools/import_hf.py --model {folder} --output FOLDER"
        )
    if (folder / CONFIG).is_file():
        number = folder.resolve().name.removeprefix("iter_")
        step = f" and --ckpt-step {int(number)}" if number.isdigit() else ""
        raise ValueError(f"--load {folder}: is one checkpoint; give --load {folder.resolve().parent}{step}")


def _saved_after_step_back(checkpoint: Path, settings: CheckpointConfig) -> bool:
    """Return whether a run with the same --ckpt-step of the same folder saved ``checkpoint``."""
    try:
        saved = read_run_config(checkpoint)["checkpoint"]
        step, load = saved["ckpt_step"], saved["load"]
    except (ValueError, KeyError):  # damaged, or of an older version
        return False
    return step == settings.ckpt_step and (load is None or same_folder(Path(load), checkpoint.parent))


def _already_stepped_back(checkpoint: Path, settings: CheckpointConfig) -> str:
    save, step = settings.save, settings.ckpt_step
    return (
        f"starting from {checkpoint}, trained from --ckpt-step {step}; to start from iteration {step} again: "
        f"tools/checkpoint.py rollback {save} {step}"
    )


def newest_intact(save: Path, verify: Verification) -> CheckpointChoice:
    """Choose the tracker's checkpoint; if it is damaged, the newest older intact one, else the newest intact one.

    The choice is None if the folder has no checkpoint. Raises ``ValueError`` that lists all if none is intact.
    """
    warnings = []
    try:
        tracked = latest_iteration(save)
    except ValueError as error:
        tracked = None
        warnings.append(str(error))
    candidates = saved_iterations(save)
    if tracked is not None:
        candidates = sorted({*candidates, tracked}, key=lambda iteration: (iteration > tracked, -iteration))
    elif candidates:
        candidates.reverse()
        warnings = warnings or [f"{save / TRACKER} is missing"]
    for iteration in candidates:
        folder = folder_of(save, iteration)
        damage = find_damage(folder, verify)
        if not damage:
            return CheckpointChoice(folder, (*warnings, f"starting from {folder} instead") if warnings else ())
        warnings.append(f"{folder} is not intact: {_first_few(damage)}")
    if not warnings:
        return CheckpointChoice()
    raise ValueError(
        f"no checkpoint to start from: {'; '.join(warnings)}; name another folder or, if you trust one of these, "
        "give it a manifest with tools/checkpoint.py seal"
    )


def prune(save: Path, keep_last: int, keep_every: int | None = None, *, dry_run: bool = False) -> list[int]:
    """Delete all but the ``keep_last`` newest intact checkpoints, multiples of ``keep_every``, and the tracker's.

    The checkpoint that a run would continue from is also kept. Returns the iterations that were deleted, or that would
    be with ``dry_run``. Raises ``ValueError`` if the tracker is unreadable or no checkpoint is intact.
    """
    saved = saved_iterations(save)
    to_continue_from = newest_intact(save, "size").folder
    kept = {latest_iteration(save), *(i for i in saved if folder_of(save, i) == to_continue_from)}
    intact = (iteration for iteration in reversed(saved) if not find_damage(folder_of(save, iteration)))
    kept |= set(islice(intact, keep_last))
    kept |= multiples(saved, keep_every)
    doomed = [iteration for iteration in saved if iteration not in kept]
    for iteration in doomed if not dry_run else ():
        delete_checkpoint(folder_of(save, iteration))
    return doomed


def multiples(iterations: Iterable[int], interval: int | None) -> set[int]:
    """Return the ``iterations`` that ``interval`` divides; the empty set without an interval."""
    return {iteration for iteration in iterations if interval is not None and iteration % interval == 0}


def rollback(save: Path, iteration: int) -> list[int]:
    """Make runs continue from ``iteration``; return the iterations of newer checkpoints, which are kept unchanged.

    Raises ``ValueError`` if the checkpoint is missing or damaged.
    """
    folder = folder_of(save, iteration)
    if damage := find_damage(folder):
        have = ", ".join(map(str, saved_iterations(save))) or "none"
        raise ValueError(f"{folder} is not intact: {_first_few(damage)}; iterations there: {have}")
    write_atomically(save / TRACKER, f"{iteration}\n")
    return [newer for newer in saved_iterations(save) if newer > iteration]


def same_folder(one: Path, other: Path | None) -> bool:
    """Return whether both paths lead to the same folder; False if ``other`` is None."""
    return other is not None and one.resolve() == other.resolve()


def _requested(source: Path, iteration: int, verify: Verification) -> Path:
    folder = folder_of(source, iteration)
    if not folder.is_dir():
        have = ", ".join(map(str, saved_iterations(source))) or "none"
        raise ValueError(f"--ckpt-step {iteration}: {folder} does not exist; iterations there: {have}")
    if damage := find_damage(folder, verify):
        raise ValueError(f"--ckpt-step {iteration}: {folder} is not intact: {_first_few(damage)}")
    return folder


def _first_few(damage: list[str]) -> str:
    return ", ".join(damage[:3]) + (f" and {len(damage) - 3} more" if len(damage) > 3 else "")
