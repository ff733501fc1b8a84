"""Read the rules of a SentencePiece normaliser: the strings that its precompiled map replaces.

The map consists of a length in bytes, a double array (Darts) over the UTF-8 bytes of the replaced strings, and the
replacements. A unit of the array holds a label in its lowest byte, in bit 8 whether a string ends here, and above that
the offset of its children.
"""

from __future__ import annotations

import numpy as np

_BYTES = np.arange(1, 256, dtype=np.uint32)
_LABEL = np.uint32(0x800000FF)


def replaced_strings(charsmap: bytes) -> set[str]:
    """Return every string that ``charsmap`` has a rule for; ``ValueError`` if it is not such a map."""
    if not charsmap:
        return set()
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 + size or size % 4:
        raise ValueError("its precompiled_charsmap is cut off")
    units = np.frombuffer(charsmap[4 : 4 + size], dtype="<u4")
    nodes, names = np.zeros(1, dtype=np.uint32), [b""]
    found: set[str] = set()
    while len(nodes):  # one byte deeper each time
        positions = nodes ^ _offset(units[nodes])
        children = positions[:, None] ^ _BYTES[None]
        there = children < len(units)
        there[there] = (units[children[there]] & _LABEL) == np.broadcast_to(_BYTES, there.shape)[there]
        parents, labels = np.nonzero(there)
        names = [names[parent] + bytes([label + 1]) for parent, label in zip(parents, labels, strict=True)]
        nodes = children[there]
        ends = (units[nodes] >> np.uint32(8)) & np.uint32(1)
        found.update(name.decode("utf-8") for name, end in zip(names, ends, strict=True) if end)
    return found


def _offset(units: np.ndarray) -> np.ndarray:
    return (units >> np.uint32(10)) << ((units & np.uint32(1 << 9)) >> np.uint32(6))
