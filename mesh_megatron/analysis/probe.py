"""Probe one model sample by sample, in memory independent of the number of samples. See docs/probes.md.

Shapes: S positions, D hidden size, M slots, K loops. A sample is one window of S + 1 token ids.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mesh_megatron.analysis import measures
from mesh_megatron.analysis.running_stats import RunningStats
from mesh_megatron.analysis.trace import Trace, Tracer


class Probe:
    """The measures of Section 4 and Figures 3 to 5, and the routers' weights: means and deviations over samples."""

    def __init__(self, tracer: Tracer, vocabulary: int) -> None:
        self.tracer = tracer
        self.routers = RouterProbe(vocabulary) if tracer.slots is not None else None
        self.samples = 0
        self._moments: defaultdict[str, RunningStats] = defaultdict(RunningStats)

    def add(self, ids: Tensor) -> None:
        """Add a sample ``ids`` [S + 1]: the first S tokens are the input, the last S the labels."""
        trace = self.tracer(ids[:-1])
        self.samples += 1
        for name, value in sample_numbers(trace, ids[1:]).items():
            self._moments[name].add(value)
        if self.routers is not None:
            self.routers.add(trace, ids[:-1])

    def to_dict(self, tokens: int = 0, tokenizer: Any = None) -> dict[str, Any]:
        """Return all numbers as plain lists; for routers also the weights of the ``tokens`` most frequent tokens."""
        loops = self.tracer.loops
        return {
            "samples": self.samples,
            "states": ["h_emb", *(f"h({loop})" for loop in range(loops + 1)), "h_out"],
            "blocks": ["prelude", *(f"loop {loop}" for loop in range(loops)), "coda"],
            **{name: moments.to_dict() for name, moments in self._moments.items()},
            "routers": None if self.routers is None else self.routers.to_dict(tokens, tokenizer),
        }


def sample_numbers(trace: Trace, labels_S: Tensor) -> dict[str, Any]:
    """Compute a sample's numbers: the paper's three measures, norms of states, and the loss of each h(t)."""
    blocks = zip(trace.states, trace.outputs, strict=False)
    return {
        "update_magnitude": [measures.update_magnitude(state, output) for state, output in blocks],
        "cka": measures.cka(trace.states).cpu(),
        "singular_values": [measures.singular_values(state).tolist() for state in trace.states],
        "state_norm": [measures.root_mean_square_norm(state) for state in trace.states],
        "loss": [loss_read_out(trace, state, labels_S) for state in trace.states[1:-1]],
    }


def loss_read_out(trace: Trace, state_SD: Tensor, labels_S: Tensor) -> float:
    """Compute the cross-entropy, in nats per token, of ``state_SD`` put through coda and head."""
    logits = trace.readout(state_SD).float()
    return F.cross_entropy(logits, labels_S.to(logits.device)).item()


class RouterProbe:
    """Weights of a mesh model's routers: overall, by position and by token."""

    def __init__(self, vocabulary: int) -> None:
        self._moments: defaultdict[str, RunningStats] = defaultdict(RunningStats)
        self._counts = torch.zeros(vocabulary, dtype=torch.long)
        self._sums: Tensor | None = None  # write and read weights by token: [V, 2, K + 1, M]
        self._starts: list[int] = []

    def add(self, trace: Trace, ids_S: Tensor) -> None:
        """Add the trace of one sample, and its input tokens ``ids_S``."""
        weights = torch.stack([torch.stack(trace.writes, 1), torch.stack(trace.reads, 1)], 1).double().cpu()
        edges = position_edges(len(ids_S))
        self._starts = edges[:-1]
        by_position = torch.stack([weights[start:stop].mean(0) for start, stop in pairwise(edges)])
        for place, name in enumerate(("write", "read")):
            self._moments[name].add(weights[:, place].mean(0))
            self._moments[f"{name}_entropy"].add(measures.entropy(weights[:, place]).mean(0))
            self._moments[f"{name}_by_position"].add(by_position[:, place])
        self._moments["coefficients"].add(trace.coefficients().double().mean(0).cpu())
        if self._sums is None:
            self._sums = torch.zeros(len(self._counts), *weights.shape[1:], dtype=torch.float64)
        ids = ids_S.cpu().long()
        self._sums.index_add_(0, ids, weights)
        self._counts += torch.bincount(ids, minlength=len(self._counts))

    def to_dict(self, tokens: int, tokenizer: Any = None) -> dict[str, Any]:
        return {
            **{name: moments.to_dict() for name, moments in self._moments.items()},
            "position_starts": self._starts,
            "by_token": list(self._by_token(tokens, tokenizer)),
        }

    def _by_token(self, tokens: int, tokenizer: Any) -> Iterator[dict[str, Any]]:
        """Yield the mean weights of the ``tokens`` most frequent tokens, most frequent first."""
        assert self._sums is not None
        for token in self._counts.argsort(descending=True, stable=True)[:tokens].tolist():
            count = int(self._counts[token])
            if count == 0:
                return
            write, read = (self._sums[token] / count).tolist()
            text = None if tokenizer is None else tokenizer.decode([token])
            yield {"id": token, "text": text, "count": count, "write": write, "read": read}


def position_edges(length: int) -> list[int]:
    """Return the edges 0, 1, 2, 4, 8, ... and ``length`` of ranges of positions that double in length."""
    return [0, *(2**power for power in range((length - 1).bit_length())), length]


def sample_windows(streams: Mapping[str, Sequence[int] | np.ndarray], length: int, samples: int) -> list[np.ndarray]:
    """Choose at most ``samples`` windows of ``length`` + 1 ids, evenly spread over all windows of ``streams``.

    Windows are consecutive, as in training; neighbours share one id. Raises ``ValueError`` for a stream that is shorter
    than one window.
    """
    for name, ids in streams.items():
        if len(ids) <= length:
            raise ValueError(
                f"--data-path {name}: has {len(ids)} tokens, a window has {length + 1}: use a smaller --seq-length"
            )
    names = list(streams)
    ends = np.cumsum([(len(streams[name]) - 1) // length for name in names])  # windows up to the end of each stream
    taken = min(samples, int(ends[-1]))
    windows = []
    for number in range(taken):
        place = number * int(ends[-1]) // taken
        index = int(np.searchsorted(ends, place, side="right"))
        start = (place - int(ends[index - 1] if index else 0)) * length
        windows.append(np.asarray(streams[names[index]][start : start + length + 1], dtype=np.int64))
    return windows
