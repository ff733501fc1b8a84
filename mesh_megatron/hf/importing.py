"""Import a model of another program as a checkpoint that training loads under any layout of ranks.

``Importer`` writes the checkpoint from any ``Source``; ``HubModel`` is the source for a Hugging Face folder, and
``hf/megatron_model.py`` has the one for a checkpoint of Megatron-LM.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from mesh_megatron.checkpoint.folder import CONFIG, TRACKER
from mesh_megatron.checkpoint.manifest import seal
from mesh_megatron.checkpoint.reader import without_process_group
from mesh_megatron.config.cli import to_dict
from mesh_megatron.config.data import DataConfig
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.data.tokenizers import build_tokenizer
from mesh_megatron.hf.convert import StateDictAdapter, from_hf_config
from mesh_megatron.hf.import_options import MARK, ImportOptions
from mesh_megatron.hf.uptrain import (
    DIFFERENCE,
    CoreInit,
    difference_at_base,
    layer_sources,
    recursive_config,
    start_at_base,
)
from mesh_megatron.util.staged_folder import staged_folder

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.spm", "*.codes", "*.tiktoken", "tekken.json"),
)
_CHAT_TEMPLATES = ("chat_template*", "additional_chat_templates/*")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Content of metadata.json, from which Megatron-Core learns the folder's format.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class Source(Protocol):
    """A model to import: its settings, and its tensors one by one under the checkpoint's keys (``adapter.shapes``)."""

    folder: Path
    model: ModelConfig
    adapter: StateDictAdapter

    @property
    def eod(self) -> int | None:
        """The end-of-document id that it declares, or None."""

    def read(self, key: str) -> torch.Tensor:
        """Read the tensor of checkpoint key ``key``."""

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype in which ``read`` returns ``key``."""


def write_import(source: Source, options: ImportOptions, tokenizer: Path | None = None) -> str:
    """Write the checkpoint that ``options`` ask for; return lines that describe it and how to train it.

    The Hugging Face tokenizer in the folder ``tokenizer``, if there is one, is copied.
    """
    target = source.model
    if options.layout is not None:
        target = recursive_config(source.model, options.layout, options.recurrence or "mesh", **options.model_flags)
    with staged_folder(options.output, options.force, MARK) as folder:
        settings = None
        if tokenizer is not None and copy_tokenizer(tokenizer, folder / "tokenizer"):
            trained = build_tokenizer("HuggingFaceTokenizer", folder / "tokenizer")
            settings = (options.output.absolute() / "tokenizer", trained.vocab_size, trained.eod)
        Importer(source, target, options.init or "average").write(folder, settings)
    command = f"pretrain_mesh.py --config {options.output}/model.yaml --load {options.output} --data-path ..."
    return f"{options.output}: {target.recurrence} {target.layout} from {source.folder}\ntrain it: {command}"


class HubModel:
    """A folder with ``config.json`` and safetensors: a native ``gpt_neox`` or an export of this project.

    None of its code runs. ``model`` is its ``ModelConfig``, ``adapter`` converts its tensors, ``read`` reads one.
    Raises ``ValueError`` if the folder is incomplete, damaged or not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ValueError(
                f"{folder}: no such folder; a model of the hub must be here first: hf download ID --local-dir"
            )
        try:
            self.content: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{folder}: cannot read config.json: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{folder}: config.json is not JSON: {error}") from error
        if not isinstance(self.content, dict):
            raise ValueError(f"{folder}: config.json holds no settings")
        self.model, native = from_hf_config(self.content, f"{folder}")
        assert self.model.padded_vocab_size is not None
        self.adapter = StateDictAdapter(self.model, self.model.padded_vocab_size, native)
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for path in _weight_files(folder):
            self._scan(path)
        self._sources = self.adapter.sources(self._shapes, f"{folder}")

    def _scan(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    self._files[name] = path
                    part = file.get_slice(name)
                    self._shapes[name] = tuple(part.get_shape())
                    if part.get_dtype() in _DTYPES:
                        self._dtypes[name] = _DTYPES[part.get_dtype()]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a safetensors file, or a damaged one: {error}") from error

    def read(self, key: str) -> torch.Tensor:
        """Read the tensor of checkpoint key ``key``."""
        name = self._sources[key]
        with safe_open(self._files[name], framework="pt") as file:
            return self.adapter.from_hf(name, file.get_tensor(name))[1]

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype in which ``read`` returns ``key``."""
        if key.startswith("recurrence."):
            return torch.float32
        name = self._sources[key]
        if name not in self._dtypes:
            raise ValueError(f"{self._files[name]}: {name} is not in float32, bfloat16 or float16")
        return self._dtypes[name]

    @property
    def eod(self) -> int | None:
        """The end-of-document id in its configuration, or None."""
        eos = self.content.get("eos_token_id")
        return next(iter(eos), None) if isinstance(eos, list) else eos


@dataclass(frozen=True)
class Importer:
    """Writes ``source`` as a checkpoint of ``target``: the same model, or a recursive one made from its layers."""

    source: Source
    target: ModelConfig
    init: CoreInit = "average"

    def write(self, folder: Path, tokenizer: tuple[Path, int, int | None] | None = None) -> None:
        """Write a save folder with one checkpoint of iteration 0, and ``model.yaml`` with the settings to train it.

        ``tokenizer`` is the folder of a Hugging Face tokenizer, its vocabulary size and its end-of-document id.
        """
        data, known, eod = DataConfig(), None, self.source.eod
        if tokenizer is not None:
            data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=tokenizer[0])
            known, eod = tokenizer[1], tokenizer[2] if eod is None else eod
        run = RunConfig(model=self.target, data=data)
        checkpoint = folder / "iter_0000000"
        checkpoint.mkdir()
        self._write_tensors(checkpoint)
        progress = {"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0}
        torch.save({"train_state": {**progress, "skipped_steps": 0, "nan_steps": 0}}, checkpoint / "common.pt")
        (checkpoint / "metadata.json").write_text(json.dumps(_FORMAT))
        resolved = {"padded_vocab_size": self.adapter.vocabulary, "tokenizer_vocab_size": known, "eod_id": eod}
        record = to_dict(run) | {"resolved": resolved | progress}
        (checkpoint / CONFIG).write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
        seal(checkpoint)
        (folder / TRACKER).write_text("0\n")
        settings = {"model": _changed(self.target, ModelConfig()), "data": _changed(data, DataConfig())}
        text = yaml.safe_dump({name: group for name, group in settings.items() if group}, sort_keys=False)
        (folder / "model.yaml").write_text(text, encoding="utf-8")

    @property
    def adapter(self) -> StateDictAdapter:
        return replace(self.source.adapter, model=self.target, native=False)

    def _write_tensors(self, checkpoint: Path) -> None:
        # Plan with shapes only and read each tensor when it is written: the complete model is never in memory.
        shapes = {
            key: torch.empty(shape, dtype=self.dtype(key), device="meta") for key, shape in self.adapter.shapes.items()
        }
        with without_process_group():
            writer = dcp.FileSystemWriter(checkpoint)
            dcp.save(shapes, storage_writer=writer, planner=_LazyPlanner(self.tensor), no_dist=True)

    def tensor(self, key: str) -> torch.Tensor:
        """Return the new checkpoint's tensor ``key``: copied, averaged over source layers, or newly initialised."""
        layers = self._layer_keys(key)
        if layers is None and DIFFERENCE.search(key):
            return difference_at_base(key, self.adapter.shapes[key], self.target).to(self.dtype(key))
        if layers is None:
            return start_at_base(key, self.target)
        tensors = [self.source.read(layer) for layer in layers]
        if len(tensors) == 1:
            return tensors[0]
        return torch.stack([tensor.float() for tensor in tensors]).mean(0).to(tensors[0].dtype)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype in which ``tensor`` returns ``key``."""
        layers = self._layer_keys(key)
        if layers is None and DIFFERENCE.search(key):  # as the matrix that it changes
            layers = self._layer_keys(DIFFERENCE.sub(".weight", key))
        return torch.float32 if layers is None else self.source.dtype(layers[0])

    def _layer_keys(self, key: str) -> list[str] | None:
        """Return the source's keys whose mean is ``key``, or None if ``key`` is new."""
        layer = re.fullmatch(r"(prelude|core|coda)\.layers\.(\d+)\.(.+)", key)
        if layer is None or self.target == self.source.model:
            return [key] if key in self.source.adapter.shapes else None
        if DIFFERENCE.search(key):
            return None
        numbered = [f"{segment}.layers.{index}" for segment, index in self.source.adapter.layers]
        sources = layer_sources(len(numbered), self.target.segments, self.init)
        return [f"{numbered[index]}.{layer[3]}" for index in sources[layer[1], int(layer[2])]]


class _LazyPlanner(DefaultSavePlanner):
    """Plans with meta tensors and reads each real tensor when it is written."""

    def __init__(self, read: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self.read = read

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.read(index.fqn)


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer's files of a model folder, and its chat templates, to ``target``; False if it has none."""
    if not any(any(source.glob(pattern)) for pattern in TOKENIZER_FILES):
        return False
    patterns = (*TOKENIZER_FILES, *_CHAT_TEMPLATES)
    for path in sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()}):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return True


def _weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model folder that transformers reads, a single file before those of an index.

    Raises ``ValueError`` for pickled weights, which are not read.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        return [single]
    if not index.exists():
        pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
        hint = f" ({pickled[0]} is pickled and not read: save it as safetensors)" if pickled else ""
        raise ValueError(f"{folder}: no model.safetensors there{hint}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of safetensors files: {error}") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index}: {outside[0]} lies outside the folder")
    return [folder / name for name in names]


def _changed(config: Any, default: Any) -> dict[str, Any]:
    """Return the settings that differ from their defaults."""
    plain, defaults = to_dict(config), to_dict(default)
    return {name: str(v) if isinstance(v, Path) else v for name, v in plain.items() if v != defaults[name]}
