"""Generate the texts on which two libraries for the same tokenizer are compared (``proof.py`` explains the proof)."""

from __future__ import annotations

import itertools
import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

# One code point next to what normalisers and pre-tokenizers examine: letters of each case, digits, spaces, ends of
# lines, punctuation, ideographs and the parts of 's, 're, 'll; also doubled, at the start and at the end.
CONTEXT = "{0}a{0}a{0}A{0}A{0}a{0}1{0}1{0}.{0}.{0}'s{0}\n{0}  {0}  {0}\t{0}/{0}{0}日{0} '{0} '{0}e 'l{0}\r{0}"
# The same in short, for code points that have had their category since Unicode 3.2, so that every library knows it.
SHORT_CONTEXT = "{0}a{0}A{0}1{0} {0}'s{0}\n{0}.{0}{0}日{0}"
ALONE = ("{0}", " {0} ")
# Kinds of characters that English text and programs need. If the two libraries differ on these, gigatoken is not used.
CORE = ("a", "A", "1", " ", "\n", ".", "'", "s", "ll")
# Characters that pre-tokenizers name, each a class of its own.
NAMED = ("\r", "\t", "/", "_", "-", "\x0b", "\x85", "\u00a0", "\u200d", "日", "ひ", "ア", "한")
CORE_LENGTH, LONG_TEXTS, LONG_LENGTH = 5, 300, 300
_EDGES = ("", "a", "A", "1", " ", "  ", "\n", ".", "'s", "é", "日")


def assigned() -> list[str]:
    """Return the code points in the standard library's Unicode tables, except private ones and surrogates."""
    return [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Co", "Cs")]


def in_context(character: str) -> str:
    """Return ``character`` in every context that matters for it."""
    long_known = unicodedata.ucd_3_2_0.category(character) == unicodedata.category(character)
    return (SHORT_CONTEXT if long_known else CONTEXT).format(character)


def in_nfc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def character_class(character: str) -> str:
    """Return the class of ``character``; a class is accepted or rejected as a unit."""
    return character if character in CORE or character in NAMED else unicodedata.category(character)


def representatives(allowed: Sequence[str]) -> dict[str, str]:
    """Return one of the ``allowed`` characters of each class; each core character is its own class."""
    found = {name: name for name in CORE}
    for character in allowed:
        found.setdefault(character_class(character), character)
    return found


def sequences(members: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield all sequences of two and three classes, and of five core classes."""
    yield from itertools.product(members, repeat=2)
    yield from itertools.product(members, repeat=3)
    yield from itertools.product([member for member in members if member in CORE], repeat=CORE_LENGTH)


def long_texts(members: Sequence[str], pieces: Sequence[str]) -> list[str]:
    """Return texts that mix classes and vocabulary pieces at many offsets, and long runs of one class."""
    draw = random.Random(1)
    runs = [member * length for member in members for length in (*range(4, 72), 1000)]
    mixed = ["".join(draw.choices(members, k=LONG_LENGTH)) for _ in range(LONG_TEXTS)]
    joined = ["".join(draw.choices(pieces, k=LONG_LENGTH)) for _ in range(LONG_TEXTS)] if pieces else []
    return runs + mixed + joined


def piece_texts(piece: str) -> tuple[str, str]:
    """Return texts with a vocabulary piece alone, next to letters, doubled and after a space."""
    return piece, f"{piece}{piece} {piece}a{piece}\n{piece}"


def runs_of_pieces(pieces: Sequence[str]) -> list[str]:
    """Return runs of what repeats within a piece: their merges overlap, so the order of equal merges matters."""
    units: Counter[str] = Counter()
    for piece in pieces:
        period = (piece + piece).find(piece, 1)
        if period < len(piece):
            units[piece[:period]] = max(units[piece[:period]], len(piece))
    return [
        before + (unit * (2 * longest // len(unit) + 2))[:length] + after
        for unit, longest in units.items()
        for length in range(len(unit), min(2 * longest + 2, 80))
        for before, after in (("", ""), (" ", "a"))
    ]


def token_texts(token: str) -> list[str]:
    """Return texts with an added token between all kinds of neighbours, doubled, and its prefixes and suffixes."""
    between = [before + token + after for before, after in itertools.product(_EDGES, _EDGES)]
    doubled = [before + token + token + after for before, after in itertools.product(_EDGES, ("", " ", "a", "\n"))]
    parts = [token[:end] for end in range(1, len(token))] + [token[start:] for start in range(1, len(token))]
    return between + doubled + [f"{token} {token}\n{token}"] + [f"a{part}a {part}" for part in parts]


def overlaps(tokens: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (token, token, text) for each pair side by side, and overlapping where one's end is the other's start."""
    for first, second in itertools.permutations(tokens, 2):
        yield first, second, f"a{first}{second}a"
        for shared in range(1, min(len(first), len(second))):
            if first.endswith(second[:shared]):
                yield first, second, f"a{first}{second[shared:]}a"
