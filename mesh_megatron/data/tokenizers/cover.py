"""Describe the texts that gigatoken may tokenize, and test quickly whether a document is one."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Proof:
    """The result of ``proof.prove`` for one tokenizer: the texts for which gigatoken gives the vendor library's ids."""

    refusal: str = ""
    """Why gigatoken is not used for this tokenizer; the other fields are empty then."""
    ranges: tuple[tuple[int, int], ...] = ()
    """First and last code point of each range that a text may contain."""
    strings: tuple[str, ...] = ()
    """Strings that a text must not contain, such as added tokens."""
    nfc: bool = False
    """True if a text must be in NFC."""

    @property
    def code_points(self) -> int:
        return sum(last - first + 1 for first, last in self.ranges)


def ranges_of(characters: Iterable[str]) -> tuple[tuple[int, int], ...]:
    """Return the code points as (first, last) of each contiguous range."""
    found: list[tuple[int, int]] = []
    for number in sorted(map(ord, characters)):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return tuple(found)


class Cover:
    """Callable test: ``cover(text)`` is True if a proof holds for ``text``."""

    def __init__(self, proof: Proof) -> None:
        self.nothing = bool(proof.refusal) or not proof.ranges
        self.nfc = proof.nfc
        self.ascii = bool(proof.ranges) and proof.ranges[0][0] == 0 and proof.ranges[0][1] >= 127
        inside = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in proof.ranges)
        self.outside = re.compile(f"[^{inside}]" if inside else "")
        # strings have few distinct beginnings, and most texts contain none of them
        self.strings: defaultdict[str, list[str]] = defaultdict(list)
        for string in proof.strings:
            self.strings[string[:2]].append(string)

    def __call__(self, text: str) -> bool:
        if self.nothing:
            return False
        if not (self.ascii and text.isascii()) and self.outside.search(text):
            return False
        for start, strings in self.strings.items():
            if start in text and any(string in text for string in strings):
                return False
        return not self.nfc or text.isascii() or unicodedata.is_normalized("NFC", text)
