"""Token ids to read a model's numbers off: .bin/.idx pairs and text files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mesh_megatron.data.indexed import read_indexed
from mesh_megatron.data.tokenizers.library_errors import as_value_error
from mesh_megatron.hf.loading import LoadedModel


def read_stream(path: str) -> np.ndarray | str:
    """All tokens of a .bin/.idx pair, or the text of a file; ``ValueError`` where ``path`` is neither."""
    if Path(path + ".idx").exists():
        return read_indexed(path).tokens
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data-path {path}: neither {path}.idx nor a text file: {error}") from error


def token_ids(loaded: LoadedModel, name: str, stream: np.ndarray | str) -> Any:
    """Ids as they are, or those of a text, after an end of document so that its first token is predicted too."""
    if not isinstance(stream, str):
        return stream
    if loaded.tokenizer is None:
        raise ValueError(f"--data-path {name} is text and the model has no tokenizer: give a .bin/.idx prefix")
    with as_value_error(f"--data-path {name} is not tokenizable"):
        ids = loaded.tokenizer(stream, verbose=False)["input_ids"]
    return [loaded.eod, *ids] if loaded.eod is not None and ids[:1] != [loaded.eod] else ids
