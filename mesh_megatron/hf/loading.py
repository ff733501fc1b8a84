"""Load a model for evaluation or generation, from a training checkpoint or an exported folder.

Exports of this project are loaded with this package's own ``modeling_mesh.py``: no code in the folder runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GPTNeoXForCausalLM, PreTrainedConfig, PreTrainedModel

from mesh_megatron.checkpoint.reader import CheckpointReader
from mesh_megatron.config.data import DataConfig
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.hf.convert import StateDictAdapter
from mesh_megatron.hf.export import Exporter
from mesh_megatron.hf.importing import TOKENIZER_FILES, HubModel
from mesh_megatron.hf.modeling_mesh import MeshForCausalLM
from mesh_megatron.hf.tokenizer import TrainingTokenizer, export_tokenizer, load_tokenizer

BuildTokenizer = Callable[[DataConfig], TrainingTokenizer | None]


@dataclass(frozen=True)
class LoadedModel:
    """A causal transformers model and its transformers tokenizer, if it has one."""

    model: Any
    tokenizer: Any

    @property
    def max_length(self) -> int:
        """The longest sequence the model was made for."""
        return self.model.config.max_position_embeddings

    @property
    def trained_loops(self) -> int | None:
        """Number of times that the shared core ran in training; None for a model without one."""
        config = self.model.config
        return config.num_trained_loops if isinstance(self.model, MeshForCausalLM) and config.share_core else None

    def set_loops(self, loops: int) -> None:
        """Run the shared core ``loops`` times from now on; raise ``ValueError`` for a model without one."""
        if self.trained_loops is None:
            raise ValueError(f"--loops {loops}: the model has no shared core; drop the flag")
        self.model.set_num_loops(loops)

    def set_exits(self, criterion: str | None, threshold: float | None) -> None:
        """Let tokens leave the core early from now on, or with None not; raise ``ValueError`` for a model that cannot.

        ``MeshConfig`` describes both arguments.
        """
        if (criterion is None) != (threshold is None):
            raise ValueError("--exit-criterion and its threshold belong together: give both or neither")
        if criterion is not None and self.trained_loops is None:
            raise ValueError(f"--exit-criterion {criterion}: the model has no shared core; drop the flag")
        if self.trained_loops is not None:
            config = self.model.config
            config.exit_criterion, config.exit_threshold = criterion, threshold or 0.0
            config.check_exits()

    @property
    def eod(self) -> int | None:
        eos = self.model.generation_config.eos_token_id
        return next(iter(eos), None) if isinstance(eos, list) else eos


def load_model(
    folder: Path,
    iteration: int | None,
    dtype: torch.dtype | None,
    device: torch.device,
    build: BuildTokenizer,
    tokenizer_model: Path | None = None,
) -> LoadedModel:
    """Load ``folder``: an exported model, a run's save folder, or one checkpoint of it.

    ``build`` makes the training tokenizer of a checkpoint, from ``tokenizer_model`` if it has moved; ``dtype`` None
    keeps the stored precision. Raises ``ValueError`` for a folder that is none of these or is damaged.
    """
    if _is_export(folder, iteration):
        if tokenizer_model is not None:
            raise ValueError(
                f"--tokenizer-model {tokenizer_model}: --load {folder} is an exported model, which has its own; drop "
                "the flag"
            )
        model, tokenizer = _from_export(folder, dtype)
    else:
        reader = CheckpointReader(folder, iteration)
        model, tokenizer = _from_checkpoint(reader, dtype, build(reader.data(tokenizer_model)))
    return LoadedModel(model.to(device).eval(), tokenizer)


def read_model_config(folder: Path, iteration: int | None = None) -> ModelConfig:
    """Read the settings of the model in ``folder`` without its weights; arguments and errors as in ``load_model``."""
    if _is_export(folder, iteration):
        return HubModel(folder).model
    return CheckpointReader(folder, iteration).config.model


def _is_export(folder: Path, iteration: int | None) -> bool:
    if not (folder / "config.json").exists():
        return False
    if iteration is not None:
        raise ValueError(f"--iteration {iteration}: --load {folder} is an exported model, not a run; drop the flag")
    return True


def _from_export(folder: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    hub = HubModel(folder)  # says what is missing, unknown or damaged
    try:
        model = _class(hub.adapter).from_pretrained(str(folder), dtype=dtype or "auto", local_files_only=True)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: cannot be read: {error}") from error
    has_tokenizer = any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)
    return model, load_tokenizer(folder, model.config) if has_tokenizer else None


def _from_checkpoint(
    reader: CheckpointReader, dtype: torch.dtype | None, trained: TrainingTokenizer | None
) -> tuple[Any, Any]:
    exporter = Exporter(reader, dtype, shard_bytes=10**9)
    config = exporter.config
    model = _class(exporter.adapter)._from_config(config, dtype=config.dtype)
    state = model.state_dict()
    for keys in exporter.shards():
        for name, tensor in exporter.convert(keys):
            state[name.replace("embed_out.", "lm_head.")].copy_(tensor)
    model.generation_config = exporter.generation_config()
    return model, _convert_tokenizer(trained, config)


def _convert_tokenizer(trained: TrainingTokenizer | None, config: PreTrainedConfig) -> Any:
    """Convert the training tokenizer to transformers; None without a tokenizer or if the data are ids already."""
    if trained is None or trained.kind == "NullTokenizer":
        return None
    with tempfile.TemporaryDirectory() as folder:
        export_tokenizer(trained, Path(folder), config)
        return load_tokenizer(Path(folder), config)


def _class(adapter: StateDictAdapter) -> type[PreTrainedModel]:
    return GPTNeoXForCausalLM if adapter.native else MeshForCausalLM
