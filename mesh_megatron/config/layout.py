"""Layer layouts in the paper's notation: ``4+8R2+4``, ``4+8+8+4``, ``24``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FIX = "write P+CRK+Q for a shared core (4+8R2+4), P+C+...+C+Q for unshared loops (4+8+8+4) or N for a plain model (24)"


@dataclass(frozen=True)
class Layout:
    """Number of layers in each segment, and how often the core runs (Section 2).

    A plain model of N layers is stored as two halves around an empty core, so that a pipeline can split it in the same
    way as the others.
    """

    prelude: int
    core: int
    loops: int
    coda: int
    shared: bool = True

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Parse the paper's notation; raise ``ValueError`` naming the accepted forms."""
        text = text.replace(" ", "")
        if shared := re.fullmatch(r"(\d+)\+(\d+)R(\d+)\+(\d+)", text):
            prelude, core, loops, coda = map(int, shared.groups())
            layout = cls(prelude, core, loops, coda, shared=True)
        elif re.fullmatch(r"\d+(\+\d+){2,}", text):
            prelude, *cores, coda = map(int, text.split("+"))
            if len(set(cores)) > 1:
                raise ValueError(f"--layout {text}: the unshared loops differ in depth; {_FIX}")
            layout = cls(prelude, cores[0], len(cores), coda, shared=False)
        elif text.isdigit() and int(text) > 0:
            return cls(int(text) // 2, 0, 0, int(text) - int(text) // 2, shared=False)
        else:
            raise ValueError(f"--layout {text} does not parse; {_FIX}")
        if layout.loops < 1:
            raise ValueError(f"--layout {text}: the core must run at least once; use R1 or more")
        if layout.core < 1:
            raise ValueError(f"--layout {text}: the core needs at least one layer; {_FIX}")
        return layout

    def __str__(self) -> str:
        if self.loops == 0:
            return str(self.prelude + self.coda)
        core = f"{self.core}R{self.loops}" if self.shared else "+".join([str(self.core)] * self.loops)
        return f"{self.prelude}+{core}+{self.coda}"

    def unshared(self) -> Layout:
        """Return the layout with a separate core for each loop, which computes as many layers."""
        return Layout(self.prelude, self.core, self.loops, self.coda, shared=False)

    @property
    def unique_core_layers(self) -> int:
        """Core layers with their own weights: C if shared, else C*K."""
        return self.core if self.shared else self.core * self.loops

    @property
    def unique_layers(self) -> int:
        """Layers with their own weights, in all segments."""
        return self.prelude + self.unique_core_layers + self.coda

    @property
    def computed_layers(self) -> int:
        """N_compute = P + C*K + Q, the depth that output projections are scaled for (Appendix B)."""
        return self.prelude + self.core * self.loops + self.coda

    def computed_before(self, cycle: int) -> int:
        """Return the number of layers computed before those of ``cycle``, besides their index in the segment.

        Cycle 0 is the prelude; then come as many loops as run (of a shared core perhaps fewer), then the coda.
        """
        if cycle == 0:
            return 0
        counted = self.shared or cycle > self.loops  # indices of unshared loops count the loops before them
        return self.prelude + self.core * (cycle - 1) * counted

    def core_slice(self, loop: int) -> range:
        """Return the indices of the core's unique layers that loop ``loop`` (from 0) runs."""
        first = 0 if self.shared else loop * self.core
        return range(first, first + self.core)


def share(layers: range, rank: int, ranks: int) -> range:
    """Return the slice of a segment's layers that one rank of a ring holds; sizes differ by at most one."""
    start, stop = (len(layers) * r // ranks for r in (rank, rank + 1))
    return layers[start:stop]
