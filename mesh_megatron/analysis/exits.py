"""Exits of tokens at thresholds of a criterion: the loops that they run, and what this does to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mesh_megatron.analysis.running_stats import RunningStats
from mesh_megatron.hf.loading import LoadedModel


class ExitProbe:
    """Means over samples of the loops that tokens run and of their loss, at each threshold."""

    def __init__(self, loaded: LoadedModel, criterion: str, thresholds: Sequence[float]) -> None:
        """Raise ``ValueError`` for a model whose tokens cannot leave its core."""
        self.loaded, self.criterion, self.thresholds = loaded, criterion, thresholds
        for threshold in thresholds:
            loaded.set_exits(criterion, threshold)
        loaded.set_exits(None, None)
        self._moments = {threshold: (RunningStats(), RunningStats()) for threshold in thresholds}

    @torch.no_grad()
    def add(self, ids: Tensor) -> None:
        """Add a sample ``ids`` [S + 1]: the first S tokens are the input, the last S the labels."""
        model = self.loaded.model
        ids = ids.to(model.device)
        for threshold, (shares, losses) in self._moments.items():
            self.loaded.set_exits(self.criterion, threshold)
            try:
                out = model(ids[None, :-1], use_cache=False)
            finally:
                self.loaded.set_exits(None, None)
            counts = torch.bincount(out.exit_loops.flatten(), minlength=model.config.num_loops + 1)[1:]
            shares.add((counts / counts.sum()).double().cpu())
            losses.add(F.cross_entropy(out.logits[0].float(), ids[1:]).item())

    def to_dict(self) -> dict[str, Any]:
        """Return by threshold the mean number of loops, the share of tokens by number of loops (from 1), the loss."""
        found = []
        for threshold, (shares, losses) in self._moments.items():
            mean = shares.to_dict()["mean"]
            loops = sum(number * share for number, share in enumerate(mean, start=1))
            found.append({"threshold": threshold, "loops": loops, "shares": mean, "loss": losses.to_dict()["mean"]})
        return {"criterion": self.criterion, "thresholds": found}
