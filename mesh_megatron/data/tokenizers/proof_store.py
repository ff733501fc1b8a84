"""Store the proof of each tokenizer, so that only its first use takes time.

The name of a file depends on everything that the proof depends on: the tokenizer's content, the libraries' versions,
the Unicode tables and ``VERSION``. Files are written atomically; if several processes prove at the same time, they find
the same and the last one's file stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import tempfile
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.data.tokenizers.cover import Proof
from mesh_megatron.data.tokenizers.vendors import HuggingFace, SentencePiece, TikToken
from mesh_megatron.util.atomic_files import open_to_others

Choice = Literal["auto", "gigatoken", "vendor"]
VERSION = 1
"""Version of the proof; increase it when the tested texts or their evaluation change."""
_LIBRARIES = {HuggingFace: "tokenizers", SentencePiece: "sentencepiece", TikToken: "tiktoken"}


def choose(tokenizer: Tokenizer, choice: Choice) -> Proof:
    """Return the proof to use; ``ValueError`` if gigatoken is requested and cannot be used."""
    if choice == "vendor":
        return Proof(refusal="asked for")
    proof = proof_of(tokenizer)
    if choice == "gigatoken" and proof.refusal:
        raise ValueError(f"--tokenizer-backend gigatoken: {proof.refusal}; use --tokenizer-backend vendor")
    return proof


def proof_of(tokenizer: Tokenizer) -> Proof:
    """Return the stored proof or make a new one, which is stored if the folder is writable."""
    name = _name(tokenizer)
    if name is None:
        return Proof(refusal=f"gigatoken has no {tokenizer.kind}")
    path = folder() / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return _read(path)
    from mesh_megatron.data.tokenizers.proof import prove  # its imports take time

    proof = prove(tokenizer)
    with contextlib.suppress(OSError):  # not writable: the next run proves again
        _write(path, proof)
    return proof


def folder() -> Path:
    """Return the folder of proofs: ``mesh_megatron/tokenizers`` in XDG_CACHE_HOME, or else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mesh_megatron" / "tokenizers"


def _name(tokenizer: Tokenizer) -> str | None:
    """Hash everything that determines a proof; None for a tokenizer without a counterpart in gigatoken."""
    library = next((library for kind, library in _LIBRARIES.items() if isinstance(tokenizer, kind)), None)
    content = _content(tokenizer)
    if library is None or content is None:
        return None
    versions = [f"{name} {_version(name)}" for name in ("gigatoken", library)]
    digest = hashlib.sha256("\0".join([str(VERSION), *versions, unicodedata.unidata_version]).encode())
    for part in content:
        digest.update(b"\0" + str(len(part)).encode() + b"\0" + part)
    return digest.hexdigest()


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _content(tokenizer: Tokenizer) -> list[bytes] | None:
    """Return everything that determines a tokenizer's ids; None for one that is written in Python."""
    if isinstance(tokenizer, SentencePiece):
        return [tokenizer.processor.serialized_model_proto()]
    if isinstance(tokenizer, HuggingFace):
        if tokenizer.inner is None:
            return None
        return [tokenizer.to_json().encode(), str(tokenizer.include_special_tokens).encode()]
    if isinstance(tokenizer, TikToken):
        encoding = tokenizer.encoding
        ranks = b"".join(
            b"%d %d %s" % (rank, len(token), token)
            for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
        )
        special = json.dumps(sorted(encoding._special_tokens.items())).encode()
        return [ranks, special, encoding._pat_str.encode(), str(tokenizer.gigatoken_scheme).encode()]
    return None


def _read(path: Path) -> Proof:
    """Read a stored proof; ``ValueError``, ``KeyError`` or ``TypeError`` if it is damaged."""
    content = json.loads(path.read_bytes())
    body = json.dumps(content["proof"])
    if hashlib.sha256(body.encode()).hexdigest() != content["sha256"]:
        raise ValueError(f"{path} is damaged")
    kept = content["proof"]
    ranges = tuple((first, last) for first, last in kept["ranges"])
    return Proof(kept["refusal"], ranges, tuple(kept["strings"]), kept["nfc"])


def _write(path: Path, proof: Proof) -> None:
    body = asdict(proof)
    text = json.dumps({"proof": body, "sha256": hashlib.sha256(json.dumps(body).encode()).hexdigest()})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        open_to_others(Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
