"""Read token streams for evaluation and probes from .bin/.idx pairs and text files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mesh_megatron.data.indexed import read_indexed
from mesh_megatron.data.tokenizers.library_errors import as_value_error
from mesh_megatron.hf.loading import LoadedModel


def read_stream(path: str) -> np.ndarray | str:
    """Read all tokens of a .bin/.idx pair, or the text of a file; ``ValueError`` if ``path`` is neither."""
    if Path(path + ".idx").exists():
        return read_indexed(path).tokens
    try:
        return Path(path).read_bytes().decode("utf-8")  # with line ends as they are
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data-path {path}: neither {path}.idx nor a text file: {error}") from error


def token_ids(loaded: LoadedModel, name: str, stream: np.ndarray | str) -> Any:
    """Return ids unchanged, or a text's ids after an end of document, so that its first token is scored too."""
    if not isinstance(stream, str):
        return stream
    if loaded.tokenizer is None:
        raise ValueError(f"--data-path {name} is text and the model has no tokenizer: give a .bin/.idx prefix")
    with as_value_error(f"--data-path {name} is not tokenizable"):
        ids = loaded.tokenizer(stream, verbose=False)["input_ids"]
    return [loaded.eod, *ids] if loaded.eod is not None and ids[:1] != [loaded.eod] else ids
