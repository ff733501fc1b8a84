"""Prove for which texts gigatoken gives the ids of the tokenizer's own library.

Both libraries normalise a text, split it at added tokens, split the rest into words by classes of characters, and merge
the bytes or characters of each word. So they agree on every text for which

- each code point is in the same class for both: all that Unicode assigns are tried in the contexts that splitting
  examines, alone and at both ends,
- both split sequences of classes alike: all of up to three classes are tried, and of five of the commonest,
- normalising changes nothing but single ASCII characters: under NFC the text is in NFC already, under a SentencePiece
  map it contains nothing else with a rule,
- each added token in it agrees between all kinds of neighbours, doubled and overlapping with the others,
- and the vocabulary is the same: every piece is tried alone, doubled and among others.

Any other document goes to the vendor's library. The tokenizer's structure is checked first (``structure.py``): if a
component is not known to fit this argument, gigatoken is not used at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mesh_megatron.data.tokenizers import probe_texts
from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.data.tokenizers.cover import Cover, Proof, ranges_of
from mesh_megatron.data.tokenizers.fast_backend import Backend, Gigatoken, Vendor, require_equal
from mesh_megatron.data.tokenizers.instrument import instrument
from mesh_megatron.data.tokenizers.structure import Structure, read_structure

_BATCH = 4096
_MOST_TOKENS = 256


def prove(tokenizer: Tokenizer) -> Proof:
    """Return the texts that gigatoken may tokenize; a refusal if it cannot load the tokenizer or differs on common
    characters."""
    try:
        structure = read_structure(tokenizer)
        trial = _Trial(Gigatoken(tokenizer), Vendor(tokenizer))
        require_equal(trial.fast, trial.slow, [*probe_texts.CORE, "".join(probe_texts.CORE)])
        proof = Proof(strings=tuple(sorted(structure.strings)), nfc=structure.nfc)
        with instrument(tokenizer) as instrumented:
            bare = _Trial(Gigatoken(instrumented), Vendor(instrumented))
            proof = _code_points(structure, proof, bare, trial)
            proof = _classes(proof, bare)
        proof = _added_tokens(structure, proof, trial)
        _vocabulary(structure, proof, trial)
    except ValueError as error:
        return Proof(refusal=str(error))
    return proof


class _Trial:
    """Compares two libraries for one tokenizer."""

    def __init__(self, fast: Backend, slow: Backend) -> None:
        self.fast, self.slow = fast, slow

    def unequal(self, texts: Sequence[str]) -> list[int]:
        """Return the numbers of the ``texts`` for which the ids differ or one library fails."""
        found: list[int] = []
        for start in range(0, len(texts), _BATCH):
            found += [start + number for number in self._unequal(texts[start : start + _BATCH])]
        return found

    def _unequal(self, texts: Sequence[str]) -> list[int]:
        try:
            first, second = self.fast.encode(texts), self.slow.encode(texts)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # a Rust panic is not an Exception
            if len(texts) == 1:
                return [0]
            half = len(texts) // 2
            return self._unequal(texts[:half]) + [half + number for number in self._unequal(texts[half:])]
        if np.array_equal(first.lengths, second.lengths):
            other = np.flatnonzero(first.ids != second.ids)
            return np.unique(np.searchsorted(np.cumsum(first.lengths), other, side="right")).tolist()
        ends = np.cumsum(first.lengths), np.cumsum(second.lengths)
        ours, theirs = np.split(first.ids, ends[0][:-1]), np.split(second.ids, ends[1][:-1])
        return [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not np.array_equal(a, b)]


def _code_points(structure: Structure, proof: Proof, bare: _Trial, trial: _Trial) -> Proof:
    """Add to ``proof`` the code points on which both agree in every context, and alone with the real vocabulary."""
    characters = [c for c in probe_texts.assigned() if c not in structure.excluded]
    judged = [(probe_texts.in_context, bare), *((context.format, trial) for context in probe_texts.ALONE)]
    for in_context, judge in judged:
        texts = [in_context(c) for c in characters]
        wrong = set(judge.unequal([probe_texts.in_nfc(text) for text in texts] if proof.nfc else texts))
        characters = [c for number, c in enumerate(characters) if number not in wrong]
        if not characters:
            raise ValueError(f"gigatoken gives other ids for every code point, such as in {texts[-1]!r}")
    return replace(proof, ranges=ranges_of(characters))


def _added_tokens(structure: Structure, proof: Proof, trial: _Trial) -> Proof:
    """Add to the strings of ``proof`` the added tokens that differ somewhere; all of them if there are many."""
    tokens = list(dict.fromkeys(structure.tokens))
    if len(tokens) > _MOST_TOKENS:
        return replace(proof, strings=(*proof.strings, *tokens))
    cases: list[tuple[tuple[str, ...], str]] = [
        ((token,), text) for token in tokens for text in probe_texts.token_texts(token)
    ]
    cases += [((first, second), text) for first, second, text in probe_texts.overlaps(tokens)]
    cover = Cover(proof)
    cases = [case for case in cases if cover(case[1])]
    wrong = {token for number in trial.unequal([text for _, text in cases]) for token in cases[number][0]}
    return replace(proof, strings=(*proof.strings, *sorted(wrong)))


def _classes(proof: Proof, trial: _Trial) -> Proof:
    """Remove from ``proof`` the classes that differ in a sequence; ``ValueError`` if a core class does."""
    allowed = [chr(number) for first, last in proof.ranges for number in range(first, last + 1)]
    members = probe_texts.representatives(allowed)
    cover, name_of = Cover(proof), {member: name for name, member in members.items()}
    candidates = [(parts, "".join(parts)) for parts in probe_texts.sequences(list(members.values()))]
    candidates = [candidate for candidate in candidates if cover(candidate[1])]
    failed = [candidates[number][0] for number in trial.unequal([text for _, text in candidates])]
    excluded: set[str] = set()
    while failed:
        counts = Counter(name_of[part] for parts in failed for part in set(parts) if part not in probe_texts.CORE)
        if not counts:
            require_equal(trial.fast, trial.slow, ["".join(failed[0])])
            raise ValueError(f"gigatoken gives other ids for {''.join(failed[0])!r} among other texts than alone")
        excluded.add(counts.most_common(1)[0][0])
        failed = [parts for parts in failed if not any(name_of[part] in excluded for part in parts)]
    return replace(proof, ranges=ranges_of(c for c in allowed if probe_texts.character_class(c) not in excluded))


def _vocabulary(structure: Structure, proof: Proof, trial: _Trial) -> None:
    """Raise ``ValueError`` if the two differ on a piece of the vocabulary."""
    cover = Cover(proof)
    pieces = [piece for piece in structure.pieces if cover(piece)]
    allowed = [chr(number) for first, last in proof.ranges for number in range(first, last + 1)]
    members = list(probe_texts.representatives(allowed).values())
    texts = [text for piece in pieces for text in probe_texts.piece_texts(piece)]
    texts += probe_texts.runs_of_pieces(pieces) + probe_texts.long_texts(members, pieces)
    texts = [text for text in texts if cover(text)]
    wrong = trial.unequal(texts)
    if wrong:
        require_equal(trial.fast, trial.slow, [texts[wrong[0]]])
        raise ValueError(f"gigatoken gives other ids for {texts[wrong[0]]!r} among other texts than alone")
