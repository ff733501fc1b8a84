"""Reading a distributed checkpoint with a reader of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import torch as torch_strategies


@contextmanager
def reading_with(reader: Callable[[Path], Any]) -> Iterator[None]:
    """Inside, Megatron-Core reads checkpoints with ``reader(folder)``.

    Its own choice is PyTorch's, which unpickles the index, and any code in it, as it is. As of 0.19.2.
    """
    original = torch_strategies._get_filesystem_reader
    torch_strategies._get_filesystem_reader = lambda folder, *args, **kwargs: reader(Path(folder))
    try:
        yield
    finally:
        torch_strategies._get_filesystem_reader = original
