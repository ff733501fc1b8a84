"""Prove again for which text gigatoken gives the ids of a tokenizer's own library, and count the other text.

    python benchmarks/tokenizer_proof.py --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json

Exhaustive over the classes of ``mesh_megatron/data/tokenizers/proof.py``; nothing is read from or written to the kept
proofs. Exits with 1 if gigatoken is not used for this tokenizer at all.
"""

from __future__ import annotations

import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field

from mesh_megatron.config.tokenizer import TokenizerConfig, TokenizerType


@dataclass(frozen=True, kw_only=True)
class Arguments(TokenizerConfig):
    """Prove gigatoken equal for one tokenizer, by class of text."""

    tokenizer_type: TokenizerType = field()
    """Kind of tokenizer."""


def main() -> int:
    from mesh_megatron.config.cli import parse
    from mesh_megatron.data.tokenizers import require_tokenizer
    from mesh_megatron.data.tokenizers.proof import prove

    args = parse(Arguments, description=__doc__)
    tokenizer = require_tokenizer(args)
    start = time.perf_counter()
    proof = prove(tokenizer)
    seconds = time.perf_counter() - start
    if proof.refusal:
        print(f"gigatoken is not used: {proof.refusal}")
        return 1
    inside = {number for first, last in proof.ranges for number in range(first, last + 1)}
    left = Counter(unicodedata.category(chr(n)) for n in range(sys.maxunicode + 1) if n not in inside)
    unknown = [left.pop(kind, 0) for kind in ("Cn", "Co", "Cs")]
    print(f"proven equal in {seconds:.1f} s: {len(inside):,} code points")
    print(
        f"to the vendor's library: {left.total():,} code points"
        + "".join(f", {kind} {count:,}" for kind, count in left.most_common())
        + f"; besides {unknown[0]:,} unassigned in Unicode {unicodedata.unidata_version}, {unknown[1]:,} for private "
        f"use, {unknown[2]:,} surrogates"
    )
    print(f"to the vendor's library: text with one of {len(proof.strings):,} strings {list(proof.strings[:8])}")
    if proof.nfc:
        print("to the vendor's library: text that is not in NFC")
    return 0


if __name__ == "__main__":
    sys.exit(main())
