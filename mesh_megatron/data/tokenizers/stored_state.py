"""Remove the state that a Hugging Face tokenizer stores beside its mapping of text to ids, so that it cannot change a
corpus, and hash the remaining mapping."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import xxhash

# Parts of a tokenizer.json that do not affect ids after ``drop_state``.
_NO_MAPPING = ("version", "truncation", "padding", "decoder")
# Settings of a Python tokenizer that do not affect ids.
_NO_SETTING = ("name_or_path", "chat_template", "local_files_only", "is_local")
# Key in tokenizer_config.json, which transformers keeps and does not use.
_ORIGIN = "mesh_megatron_origin"
# Where a tokenizer has one token of a pair, Megatron-Core uses it for the other too.
_STAND_INS = {
    "eos_token": "sep_token",
    "sep_token": "eos_token",
    "bos_token": "cls_token",
    "cls_token": "bos_token",
}


def read_no_copies() -> None:
    """Disable tiktoken's cache, which copies a rank file by path and keeps reading the copy after the file changed."""
    os.environ["TIKTOKEN_CACHE_DIR"] = ""


def drop_state(inner: Any) -> None:
    """Remove truncation, padding and BPE dropout from a ``tokenizers.Tokenizer``."""
    inner.no_truncation()
    inner.no_padding()
    if getattr(inner.model, "dropout", None):
        inner.model.dropout = None


def drop_loaded_state(loaded: Any) -> None:
    """Apply ``drop_state`` to a ``transformers`` tokenizer; also disable sampling of a SentencePiece model in it."""
    if loaded.is_fast:
        drop_state(loaded.backend_tokenizer)
    elif hasattr(loaded, "sp_model"):
        loaded.sp_model._enable_sampling = False


def add_stand_ins(loaded: Any) -> None:
    """Set missing special tokens of a ``transformers`` tokenizer as Megatron-Core does (its sep as eos, and so on)."""
    known = loaded.special_tokens_map
    missing = {name: known[other] for name, other in _STAND_INS.items() if name not in known and other in known}
    loaded.add_special_tokens(missing)


def identity_of_loaded(loaded: Any) -> str:
    """Hash everything that determines the ids and end of document of ``loaded``, whatever files it came from."""
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


def write_origin(folder: Path, loaded: Any, identities: list[dict[str, Any]]) -> None:
    """Record in ``folder``, of which ``loaded`` is the tokenizer, the identities of tokenizers that give equal ids."""
    add_stand_ins(loaded)  # as training loads it
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content[_ORIGIN] = {"fingerprint": identity_of_loaded(loaded), "identities": identities}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_origin(loaded: Any) -> list[dict[str, Any]]:
    """Return the identities that ``write_origin`` recorded; none if the tokenizer has changed since then."""
    record = loaded.init_kwargs.get(_ORIGIN)
    if not isinstance(record, dict) or record.get("fingerprint") != identity_of_loaded(loaded):
        return []
    return list(record.get("identities", []))
