"""What a Hugging Face tokenizer stores beside its mapping of text to ids: taken away when it is loaded, so that it can
change no corpus; and the identity of the mapping that is left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import xxhash

# Parts of a tokenizer.json that no text's ids depend on once ``drop_state`` was there.
_NO_MAPPING = ("version", "truncation", "padding", "decoder")
# Settings of a Python tokenizer that no text's ids depend on.
_NO_SETTING = ("name_or_path", "chat_template", "local_files_only", "is_local")
# Megatron-Core lets each of these stand in for the other where a tokenizer has one of the two.
_STAND_INS = {
    "eos_token": "sep_token",
    "sep_token": "eos_token",
    "bos_token": "cls_token",
    "cls_token": "bos_token",
}


def read_no_copies() -> None:
    """Forbid tiktoken to keep a copy of a rank file by its path and read that one for ever, also after a change."""
    os.environ["TIKTOKEN_CACHE_DIR"] = ""


def drop_state(inner: Any) -> None:
    """Take truncation, padding and BPE dropout away from a ``tokenizers.Tokenizer``."""
    inner.no_truncation()
    inner.no_padding()
    if getattr(inner.model, "dropout", None):
        inner.model.dropout = None


def drop_loaded_state(loaded: Any) -> None:
    """``drop_state`` for a ``transformers`` tokenizer: also sampling of a SentencePiece model within."""
    if loaded.is_fast:
        drop_state(loaded.backend_tokenizer)
    elif hasattr(loaded, "sp_model"):
        loaded.sp_model._enable_sampling = False


def add_stand_ins(loaded: Any) -> None:
    """Give a ``transformers`` tokenizer without eos its sep, and so on, as Megatron-Core does."""
    known = loaded.special_tokens_map
    missing = {name: known[other] for name, other in _STAND_INS.items() if name not in known and other in known}
    loaded.add_special_tokens(missing)


def identity_of_loaded(loaded: Any) -> str:
    """Hash of all that decides the ids ``loaded`` gives and its end of document, whatever files that came from."""
    digest = xxhash.xxh3_128(json.dumps([type(loaded).__name__, loaded.eos_token]).encode())
    if loaded.is_fast:
        inner = loaded.backend_tokenizer
        mapping = {name: part for name, part in json.loads(inner.to_str()).items() if name not in _NO_MAPPING}
        digest.update(json.dumps([mapping, inner.encode_special_tokens]).encode())
        return digest.hexdigest()
    for name, value in sorted(loaded.init_kwargs.items()):
        if isinstance(value, str) and Path(value).is_file():
            digest.update(name.encode() + Path(value).read_bytes())
        elif name not in _NO_SETTING:
            digest.update(f"{name} {value!r}".encode())
    digest.update(json.dumps(sorted(loaded.get_vocab().items())).encode())
    return digest.hexdigest()
