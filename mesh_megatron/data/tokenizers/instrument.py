"""Combine a tokenizer's normaliser and splitter with a vocabulary that makes every word boundary visible.

Two libraries can put a code point into different classes and still give the same ids, as long as nothing in the
vocabulary merges across the boundary. With this vocabulary every byte merges with the neighbours that splitting
examines, and code points merge with each other, so that ids differ wherever words do.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.data.tokenizers.structure import VISIBLE_BYTES
from mesh_megatron.data.tokenizers.vendors import HuggingFace, TikToken

_NEIGHBOURS = b"aA1'sl.,/ \n\r\t"


def merged_pairs() -> list[bytes]:
    """Return the pairs of bytes that merge, first those with bytes beyond ASCII."""
    pairs = {bytes(pair) for n in _NEIGHBOURS for x in range(256) for pair in ((n, x), (x, n))}
    pairs |= {bytes((end, start)) for end in range(0x80, 0xC0) for start in range(0xC2, 0xF5)}
    return sorted(pairs, key=lambda pair: (max(pair) < 128, pair))


@contextmanager
def instrument(tokenizer: Tokenizer) -> Iterator[Tokenizer]:
    """Yield ``tokenizer`` with the vocabulary that shows boundaries and without added tokens; yield it unchanged if it
    splits at spaces only, as tokenizers with SentencePiece's byte fallback do."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(tokenizer, TikToken):
            path = Path(folder) / "instrument.tiktoken"
            tokens = [bytes([number]) for number in range(256)] + merged_pairs()
            lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
            path.write_text("\n".join(lines) + "\n")
            yield TikToken(tokenizer.kind, path, tokenizer.pattern, None, 0)
            return
        parsed = json.loads(tokenizer.to_json()) if isinstance(tokenizer, HuggingFace) else None
        if parsed is None or parsed["model"].get("byte_fallback"):
            yield tokenizer
            return
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps({**parsed, "added_tokens": [], "post_processor": None, "model": _model()}))
        yield HuggingFace(tokenizer.kind, path)


def _model() -> dict[str, Any]:
    character = {number: name for name, number in VISIBLE_BYTES.items()}
    names = [character[number] for number in range(256)]
    merges = [[character[first], character[second]] for first, second in merged_pairs()]
    vocabulary = {name: number for number, name in enumerate([*names, *map("".join, merges)])}
    return {"type": "BPE", "vocab": vocabulary, "merges": merges}
