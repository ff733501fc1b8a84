"""Reading a distributed checkpoint with a reader of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies

_CHOICE = "_get_filesystem_reader"


@contextmanager
def reading_with(reader: Callable[[Path], Any]) -> Iterator[None]:
    """Inside, Megatron-Core reads checkpoints with ``reader(folder)``.

    Its own choice is PyTorch's, which unpickles the index and other objects, and any code in them, as they are. As of
    0.19.2, where two modules choose one.
    """

    def choose(folder: str | Path, *args: Any, **kwargs: Any) -> Any:
        return reader(Path(folder))

    with ExitStack() as patches:
        for module in (torch_strategies, serialization):
            if hasattr(module, _CHOICE):
                patches.enter_context(patch.object(module, _CHOICE, choose))
        yield
