"""Manage the checkpoints of a run: list, verify, prune, rollback, diff, seal. See docs/operations.md."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from tqdm import tqdm
from tyro.conf import Positional

from mesh_megatron.checkpoint.folder import (
    CONFIG,
    delete_checkpoint,
    folder_of,
    newest_intact,
    prune,
    read_run_config,
    rollback,
    saved_iterations,
)
from mesh_megatron.checkpoint.manifest import find_damage, read_manifest, seal
from mesh_megatron.config.bounds import Bounds, Count
from mesh_megatron.training.fault_tolerance.save_lock import wait_until_free

if TYPE_CHECKING:
    from mesh_megatron.checkpoint.reader import CheckpointReader


@dataclass(frozen=True)
class List:
    """List the checkpoints of a run: iteration, tokens, size, time of writing, damage found by file sizes, and the one
    that the next start continues from."""

    save: Positional[Path]
    """Folder that a run's --save named."""

    def __call__(self) -> int:
        folders, (start, notes) = _checkpoints(self.save), _start(self.save)
        print("  iteration       tokens         size  written           state")
        for folder in folders:
            damage = find_damage(folder)
            size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
            written = datetime.fromtimestamp(folder.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
            number = folder.resolve().name.removeprefix("iter_").lstrip("0") or "0"
            mark = "*" if folder == start else " "
            state = f"damaged: {', '.join(damage)}" if damage else "intact"
            print(f"{mark} {number:>9}  {_tokens(folder):>11}  {size / 1e6:>8,.1f} MB  {written}  {state}")
        if folders != [self.save]:
            last = "* is the one to continue from" if start is not None else "none of these is one to continue from"
            print(*notes, last, sep="\n")
        return 0


@dataclass(frozen=True)
class Verify:
    """Compare every file with its hash in the manifest; exit code 1 if one differs."""

    path: Positional[Path]
    """One checkpoint (iter_NNNNNNN), or a folder of them, such as a run's --save."""

    def __call__(self) -> int:
        damaged = False
        for folder in _checkpoints(self.path):
            total = sum(record["size"] for record in read_manifest(folder).values()) if not find_damage(folder) else 0
            with tqdm(total=total, desc=folder.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                damage = find_damage(folder, "hash", bar.update)
            print("\n".join(f"{folder}: {line}" for line in damage) if damage else f"{folder}: intact")
            damaged = damaged or bool(damage)
        return int(damaged)


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Delete checkpoints, but never the one to continue from. Needs --keep-last, --keep-every or both."""

    save: Positional[Path]
    """Folder that a run's --save named."""
    keep_last: Annotated[int | None, Bounds(least=0)] = None
    """Keep this many of the newest intact checkpoints; default 0 with --keep-every."""
    keep_every: Count | None = None
    """Keep checkpoints whose iteration is a multiple of this."""
    dry_run: bool = False
    """Only print what would be deleted."""

    def __call__(self) -> int:
        if self.keep_last is None and self.keep_every is None:
            raise ValueError("give --keep-last, --keep-every or both: they say what to keep")
        if self.keep_last == 0 and self.keep_every is None:
            raise ValueError("--keep-last 0 keeps none but the one to continue from: give 1 or more, or --keep-every")
        _checkpoints(self.save)
        for iteration in prune(self.save, self.keep_last or 0, self.keep_every, dry_run=self.dry_run):
            print(f"{'would delete' if self.dry_run else 'deleted'} {folder_of(self.save, iteration)}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Make a run continue from an older checkpoint. Newer ones stay until the run replaces them."""

    save: Positional[Path]
    """Folder that a run's --save named; the run must not be running."""
    iteration: Positional[int]
    """The checkpoint to continue from."""
    delete_newer: bool = False
    """Delete newer checkpoints."""

    def __call__(self) -> int:
        wait_until_free(self.save)
        newer = [folder_of(self.save, iteration) for iteration in rollback(self.save, self.iteration)]
        print(f"{folder_of(self.save, self.iteration)} is the one to continue from")
        for folder in newer:
            if self.delete_newer:
                delete_checkpoint(folder)
            print(f"{'deleted' if self.delete_newer else 'left as it is:'} {folder}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Compare two checkpoints: settings, and tensors with their largest absolute and relative difference. The layouts
    of ranks may differ; exit code 1 if tensors differ."""

    first: Positional[Path]
    """One checkpoint (iter_NNNNNNN), or a run's --save for its newest."""
    second: Positional[Path]
    """The other one."""
    rows: Count = 20
    """Number of tensors to show, largest difference first."""

    def __call__(self) -> int:
        from mesh_megatron.analysis.checkpoint_difference import compare

        first, second = _open(self.first), _open(self.second)
        with tqdm(total=len(first.all_shapes), unit="tensor", leave=False, disable=None) as bar:
            found = compare(first, second, bar.update)
        for name, (a, b) in found.settings.items():
            print(f"setting {name}: {a} -> {b}")
        for sign, names in (("only in the first", found.only_first), ("only in the second", found.only_second)):
            print("".join(f"{sign}: {name}\n" for name in names), end="")
        for name, (before, after) in found.shapes.items():
            print(f"{name}: {before} -> {after}")
        if found.tensors:
            print("   max |a-b|     relative      elements that differ  tensor")
        for tensor in sorted(found.tensors, key=lambda tensor: -tensor.largest)[: self.rows]:
            share = f"{tensor.differing:,} of {tensor.elements:,}"
            print(f"{tensor.largest:>12.4g} {tensor.relative:>12.4g} {share:>25}  {tensor.name}")
        print(f"{found.same} tensors are the same, {len(found.tensors)} differ")
        return int(not found.empty)


@dataclass(frozen=True)
class Seal:
    """Write the manifest of a checkpoint that has none (from an older version) or whose files were changed on purpose,
    so that its present files count as intact."""

    checkpoint: Positional[Path]
    """One checkpoint (iter_NNNNNNN)."""

    def __call__(self) -> int:
        read_run_config(self.checkpoint)
        seal(self.checkpoint)
        print(f"{self.checkpoint}: sealed")
        return 0


def _checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint ``path`` (or a link to one), or all checkpoints in it, oldest first."""
    if path.is_dir() and (path.resolve().name.startswith("iter_") or (path / CONFIG).exists()):
        return [path]
    folders = [folder_of(path, iteration) for iteration in saved_iterations(path)]
    if not folders:
        raise ValueError(f"{path}: no checkpoint found; give the folder that a run's --save named")
    return folders


def _start(save: Path) -> tuple[Path | None, tuple[str, ...]]:
    """Return the checkpoint that a run would continue from, if any, and why it is not the tracker's."""
    try:
        choice = newest_intact(save, "size")
    except ValueError as error:
        return None, (str(error),)
    return choice.folder, choice.warnings


def _open(checkpoint: Path) -> CheckpointReader:
    """Open a checkpoint that is no value of --load, which other commands have."""
    from mesh_megatron.checkpoint.reader import CheckpointReader

    try:
        return CheckpointReader(checkpoint)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("--load ")) from error


def _tokens(folder: Path) -> str:
    try:
        return f"{read_run_config(folder)['resolved']['consumed_tokens']:.3e}"
    except (ValueError, KeyError):
        return "?"


def main() -> int:
    from mesh_megatron.config.cli import parse, run

    command = parse(cast(Any, List | Verify | Prune | Rollback | Diff | Seal), description=__doc__)
    return run(command)
