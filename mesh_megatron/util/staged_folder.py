"""Output folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mesh_megatron.util.atomic_files import prepare_folder


@contextmanager
def staged_folder(output: Path, force: bool, mark: str) -> Iterator[Path]:
    """Yield a new folder beside ``output`` that is renamed to it if the block succeeds, and deleted otherwise.

    An existing, non-empty ``output`` is replaced only with ``force``, and only if the file ``mark`` says that it is
    the same kind of output; ``ValueError`` otherwise.
    """
    check_output(output, force, mark)
    staging = output.with_name(f".{output.name}.{os.getpid()}.new")
    replaced = output.with_name(f".{output.name}.{os.getpid()}.old")
    staging.mkdir()
    try:
        yield staging
        if output.exists():
            output.rename(replaced)
        try:
            staging.rename(output)
        except BaseException:
            if replaced.exists():
                replaced.rename(output)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def check_output(output: Path, force: bool, mark: str) -> None:
    """Raise ``ValueError`` if ``output`` must not be replaced or cannot be written, before any work is done."""
    if not output.exists():
        prepare_folder(output.parent, f"--output {output}")
        return
    if not output.is_dir():
        raise ValueError(f"--output {output}: is a file; name a folder")
    if not any(output.iterdir()):
        return
    if not force:
        raise ValueError(f"--output {output}: exists; name another folder or add --force to replace it")
    if not (output / mark).exists():
        raise ValueError(f"--output {output}: holds no {mark}, so --force does not replace it; name another folder")
