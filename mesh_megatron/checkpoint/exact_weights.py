"""Find the most precise copy of each weight in a checkpoint.

A bfloat16 or float16 run saves float32 main weights beside the model weights; a float32 run saves model weights only.
A run that continues in any precision loads both its model weights and its main weights from the most precise copy.
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
    """The dtype of every tensor in a checkpoint, from the checkpoint's index."""

    def __init__(self, index: Metadata) -> None:
        entries = index.state_dict_metadata.items()
        self._dtypes = {
            key: entry.properties.dtype for key, entry in entries if isinstance(entry, TensorStorageMetadata)
        }

    def kinds(self, known: Iterable[str]) -> tuple[str, ...]:
        """Filter ``known`` kinds of optimizer state (such as ``exp_avg``) to those that the checkpoint contains."""
        return tuple(kind for kind in known if any(key.startswith(f"optimizer.{kind}.") for key in self._dtypes))

    def check_held(self, kinds: Iterable[str], key: str) -> None:
        """Raise ``ValueError`` if the checkpoint lacks one of these ``kinds`` of state for weight ``key``."""
        for kind in kinds:
            if f"optimizer.{kind}.{key}" not in self._dtypes:
                raise ValueError(
                    f"--optimizer: the checkpoint has no {kind} of {key}, as if another --optimizer or "
                    "--exit-gate-only had written it; continue with the same flags, or give --no-load-optim to start "
                    "with empty optimizer state"
                )

    def exact_prefix(self, key: str) -> str:
        """Return the key prefix of the most precise copy of weight ``key``: ``MAIN`` or the empty string."""
        return MAIN if MAIN + key in self._dtypes else ""

    def requests(self, model_state: Sharded) -> Sharded:
        """Turn ``model_state`` into load requests; a weight saved in another dtype comes from its most precise copy."""
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
