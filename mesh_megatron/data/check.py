"""Check that a prefix fits a model: ids below the embedding's rows, and the tokenizer that the data was made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mesh_megatron.data.indexed import IndexedFile
from mesh_megatron.data.tokenizers.base import Tokenizer

# Up to this many tokens (all files together) every token is checked (under a second); of more, this many in evenly
# spread blocks.
EXACT_TOKENS = 1 << 28
BLOCK_TOKENS = 1 << 18


def check_ids(
    flag: str, file: IndexedFile, tokenizer: Tokenizer | None, vocab_size: int, most: int = EXACT_TOKENS
) -> None:
    """``ValueError`` if ``file`` holds ids without a row in the embedding, or was made with another tokenizer.

    Exact for files of up to ``most`` tokens. Of longer files this many tokens in evenly spread blocks are checked,
    and the rest as training reads it (``datasets.Samples``).
    """
    highest, lowest = extremes(file.tokens, most)
    if highest >= vocab_size or lowest < 0:
        raise ValueError(f"{flag}: {ids_beyond(file.prefix, highest if highest >= vocab_size else lowest, vocab_size)}")
    if tokenizer is not None:
        _check_tokenizer(f"{flag} {file.prefix}", read_description(file.prefix).get("tokenizer", {}), tokenizer)
    if tokenizer is not None and highest >= tokenizer.vocab_size:
        raise ValueError(
            f"{flag} {file.prefix} holds id {highest}, the tokenizer's vocabulary ends at {tokenizer.vocab_size - 1}: "
            "give the --tokenizer-model that the data was preprocessed with"
        )


def extremes(tokens: np.ndarray, most: int = EXACT_TOKENS) -> tuple[int, int]:
    """Return the (highest, lowest) id, (0, 0) if there is none; exact up to ``most`` tokens, else of spread blocks."""
    blocks = -(-len(tokens) // BLOCK_TOKENS)
    taken = np.unique(np.linspace(0, blocks - 1, min(blocks, max(most // BLOCK_TOKENS, 2))).astype(np.int64))
    highest, lowest = 0, 0
    for block in taken.tolist():
        part = tokens[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]
        highest, lowest = max(highest, int(part.max())), min(lowest, int(part.min()))
    return highest, lowest


def ids_beyond(prefix: str, found: int, vocab_size: int) -> str:
    return (
        f"{prefix}.bin holds id {found}, the embedding has rows 0 to {vocab_size - 1}: train with the tokenizer that "
        "the data was made with, or a larger --padded-vocab-size"
    )


def read_description(prefix: str) -> dict[str, Any]:
    """Return what ``tools/preprocess_data.py`` wrote to PREFIX.json; empty for files of other tools."""
    try:
        content = json.loads(Path(prefix + ".json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and content.get("format") == "mesh_megatron" else {}


def _check_tokenizer(data: str, made_with: dict[str, Any], tokenizer: Tokenizer) -> None:
    """``ValueError`` unless ``tokenizer`` made ``data``, or was converted from the one that did.

    ``made_with`` is its entry in PREFIX.json, {} if there is none.
    """
    identity = made_with.get("identity")
    if identity in (None, tokenizer.unique_identifiers):
        return
    if identity in tokenizer.converted_from and made_with.get("eod") == tokenizer.eod:
        return
    model = "" if tokenizer.model is None else f" --tokenizer-model {tokenizer.model}"
    raise ValueError(
        f"{data} was preprocessed with another tokenizer, {_named(identity)}, than --tokenizer-type {tokenizer.kind}"
        f"{model}, {_named(tokenizer.unique_identifiers)}: give the tokenizer flags that the data was preprocessed "
        "with, or preprocess its text again with these (tools/preprocess_data.py)"
    )


def _named(identity: dict[str, Any]) -> str:
    options = ", ".join(f"{name} {value}" for name, value in identity.items() if name != "class")
    return f"{identity.get('class')}{f' ({options})' if options else ''}"
