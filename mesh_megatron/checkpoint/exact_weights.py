"""Where a checkpoint has a weight most exactly.

A run in bfloat16 or float16 leaves float32 main weights beside those it computes with; one in float32 has no others.
Whatever precision the next run has, it takes the weights it computes with and its own main weights from there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mesh_megatron.checkpoint.flat_shards import of_weight

MAIN = "optimizer.main."
Sharded = dict[str, Any]


class SavedWeights:
    """The precisions that a checkpoint holds its tensors in."""

    def __init__(self, index: Metadata) -> None:
        entries = index.state_dict_metadata.items()
        self._dtypes = {
            key: entry.properties.dtype for key, entry in entries if isinstance(entry, TensorStorageMetadata)
        }

    def kinds(self, known: Iterable[str]) -> tuple[str, ...]:
        """Those of ``known`` kinds of optimizer state that the checkpoint has."""
        return tuple(kind for kind in known if any(key.startswith(f"optimizer.{kind}.") for key in self._dtypes))

    def exact_prefix(self, key: str) -> str:
        """What stands before a weight's name where it is most exact."""
        return MAIN if MAIN + key in self._dtypes else ""

    def requests(self, model_state: Sharded) -> Sharded:
        """``model_state`` as requests; a weight that was saved in another precision comes from its exact place."""
        return {
            chunk: {name: self._request(entry) for name, entry in entries.items()}
            for chunk, entries in model_state.items()
        }

    def _request(self, entry: Any) -> Any:
        wanted = getattr(entry, "data", None)
        if not isinstance(entry, ShardedBase) or not isinstance(wanted, torch.Tensor):
            return entry
        if self._dtypes.get(entry.key, wanted.dtype) == wanted.dtype:
            return entry
        return of_weight(entry, self.exact_prefix(entry.key), wanted)
