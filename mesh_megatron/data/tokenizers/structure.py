"""Read a tokenizer's structure and check whether libraries can be proven equal for it by classes of text."""

from __future__ import annotations

import base64
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.data.tokenizers.charsmap import replaced_strings
from mesh_megatron.data.tokenizers.vendors import HuggingFace, SentencePiece, TikToken

SPACE_MARK = "\u2581"


def _visible_bytes() -> dict[str, int]:
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [number for number in range(256) if number not in shown]
    return {chr(number): number for number in shown} | {chr(256 + i): number for i, number in enumerate(hidden)}


VISIBLE_BYTES = _visible_bytes()
"""The character with which byte-level vocabularies write each byte -> byte."""


@dataclass
class Structure:
    """The properties of a tokenizer that a proof needs."""

    pieces: list[str]
    """The vocabulary as text, without pieces that are a part of a code point."""
    tokens: list[str] = field(default_factory=list)
    """Strings that are extracted from a text before it is split; the proof tries them."""
    strings: set[str] = field(default_factory=set)
    """Strings that are left to the vendor's library without a trial."""
    excluded: set[str] = field(default_factory=set)
    """Code points that are left to the vendor's library without a trial."""
    nfc: bool = False


def read_structure(tokenizer: Tokenizer) -> Structure:
    """Return the structure; ``ValueError`` names a component for which a proof by classes of text does not hold."""
    if isinstance(tokenizer, SentencePiece):
        return _sentencepiece(tokenizer)
    if isinstance(tokenizer, HuggingFace):
        return _hugging_face(json.loads(tokenizer.to_json()))
    if isinstance(tokenizer, TikToken):
        encoding = tokenizer.encoding
        return Structure(_texts(encoding._mergeable_ranks), tokens=list(encoding._special_tokens))
    raise ValueError(f"gigatoken has no {tokenizer.kind}")


def _texts(pieces: Any) -> list[str]:
    found = []
    for piece in pieces:
        try:
            found.append(piece.decode("utf-8"))
        except UnicodeDecodeError:
            continue
    return found


def _sentencepiece(tokenizer: SentencePiece) -> Structure:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    model, kinds = ModelProto.FromString(tokenizer.processor.serialized_model_proto()), ModelProto.SentencePiece
    of_kind: dict[int, list[str]] = {}
    for piece in model.pieces:
        of_kind.setdefault(piece.type, []).append(piece.piece)
    if of_kind.get(kinds.UNUSED):
        raise ValueError("its model has unused pieces")
    normal = [piece for piece in model.pieces if piece.type == kinds.NORMAL and len(piece.piece) > 1]
    score, number = Counter(piece.score for piece in normal).most_common(1)[0] if normal else (0.0, 0)
    if number > 1:
        raise ValueError(f"{number} pieces of its model have the score {score}: the library decides by place")
    own = of_kind.get(kinds.USER_DEFINED, [])
    if any(" " in piece or SPACE_MARK in piece for piece in own):
        raise ValueError("its model has user-defined symbols with spaces")
    structure = Structure(
        pieces=[piece.replace(SPACE_MARK, " ") for piece in of_kind.get(kinds.NORMAL, [])],
        tokens=of_kind.get(kinds.CONTROL, []) + of_kind.get(kinds.UNKNOWN, []),
        strings={*own, *of_kind.get(kinds.BYTE, [])},
        excluded={SPACE_MARK},
    )
    _leave_out_rules(model.normalizer_spec.precompiled_charsmap, structure)
    return structure


def _hugging_face(parsed: dict[str, Any]) -> Structure:
    model, added = parsed["model"], parsed.get("added_tokens") or []
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"its model has a {name}")
    like_sentencepiece = bool(model.get("byte_fallback"))
    for part in _parts(parsed.get("pre_tokenizer"), "pretokenizers"):
        if not _known_split(part, like_sentencepiece):
            raise ValueError(f"its pre-tokenizer {json.dumps(part)[:200]} is not among those that are proven")
    if like_sentencepiece:
        pieces = [piece.replace(SPACE_MARK, " ") for piece in model["vocab"]]
        bytes_ = {piece for piece in pieces if len(piece) == 6 and piece.startswith("<0x")}
        structure = Structure([piece for piece in pieces if piece not in bytes_], strings=bytes_, excluded={SPACE_MARK})
    else:
        structure = Structure(_byte_level(model["vocab"]))
    for part in _parts(parsed.get("normalizer"), "normalizers"):
        _read_normalizer(part, structure)
    for token in added:
        _sort_token(token, like_sentencepiece, structure)
    unknown = model.get("unk_token")
    if like_sentencepiece and unknown and unknown not in structure.strings:
        structure.tokens.append(unknown)
    return structure


def _parts(step: dict[str, Any] | None, children: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a (nested) sequence."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
    for child in step.get(children, []):
        yield from _parts(child, children)


def _known_split(part: dict[str, Any], like_sentencepiece: bool) -> bool:
    if part["type"] == "Split":
        by_rule = "Regex" in part["pattern"]
        return by_rule is not like_sentencepiece
    return part["type"] == ("Metaspace" if like_sentencepiece else "ByteLevel")


def _read_normalizer(part: dict[str, Any], structure: Structure) -> None:
    kind = part["type"]
    if kind == "NFC":
        structure.nfc = True
    elif kind == "Precompiled":
        _leave_out_rules(base64.b64decode(part["precompiled_charsmap"]), structure)
    elif kind == "Replace" and part["pattern"] not in ({"String": " "}, {"Regex": " {2,}"}):
        raise ValueError(f"its normalizer replaces {part['pattern']}")
    elif kind not in ("Replace", "Prepend", "Strip"):
        raise ValueError(f"its normalizer {kind} is not among those that are proven")


def _sort_token(token: dict[str, Any], like_sentencepiece: bool, structure: Structure) -> None:
    """Have an added token tried, or left to the vendor's library if its matches depend on more than its text."""
    content, normalized = token["content"], token.get("normalized", False)
    if not content:
        raise ValueError("it has an empty added token")
    if normalized and like_sentencepiece and (" " in content or SPACE_MARK in content):
        raise ValueError(f"its added token {content!r} is looked for in normalized text")
    takes_more = any(token.get(name) for name in ("lstrip", "rstrip", "single_word"))
    if takes_more or (normalized and (like_sentencepiece or not content.isascii())):
        structure.strings |= {content, unicodedata.normalize("NFC", content)}
    else:
        structure.tokens.append(content)


def _byte_level(vocabulary: dict[str, int]) -> list[str]:
    known = VISIBLE_BYTES.keys()
    return _texts(bytes(VISIBLE_BYTES[c] for c in piece) for piece in vocabulary if known >= set(piece))


def _leave_out_rules(charsmap: bytes, structure: Structure) -> None:
    """Exclude strings with a rule from the proof, except ASCII control characters, which are tried: SentencePiece looks
    for the longest string with a rule, gigatoken for a grapheme."""
    rules = replaced_strings(charsmap)
    printable = next((rule for rule in sorted(rules) if rule.isascii() and rule.isprintable()), None)
    if printable is not None:
        raise ValueError(f"its normalizer replaces {printable!r}")
    structure.excluded |= {rule for rule in rules if len(rule) == 1 and not rule.isascii()}
    longer = [rule for rule in rules if len(rule) > 1]
    for rule in sorted(longer, key=len):
        if not structure.excluded.isdisjoint(rule):
            continue
        if rule[-1].isascii():
            structure.strings.add(rule)
        else:
            structure.excluded.add(rule[-1])
