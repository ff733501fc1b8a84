"""Preprocess a text file named by ``--data-path``, once, into the cache."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import xxhash

from mesh_megatron.config.data import DataConfig
from mesh_megatron.data.fingerprint import content
from mesh_megatron.data.preprocessing.preprocess import PreprocessOptions, preprocess
from mesh_megatron.data.preprocessing.readers import SplitOptions
from mesh_megatron.data.preprocessing.sources import FORMATS, list_sources, suffixes_of
from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.util.atomic_files import prepare_folder
from mesh_megatron.util.cores import cores

logger = logging.getLogger(__name__)


def cached_prefix(flag: str, path: str, data: DataConfig, tokenizer: Tokenizer | None, build: bool) -> str:
    """Return the prefix of the preprocessed ``path``, preprocessing it first if necessary and ``build``. Documents end
    with the tokenizer's end of document if it has one. Each content, suffix, split and tokenizer has its own prefix."""
    if tokenizer is None or data.tokenizer_type is None:
        raise ValueError(f"{flag} {path} is text: give --tokenizer-type and --tokenizer-model to preprocess it")
    cache = data.data_cache_path or Path(path).parent / "cache"
    read, append_eod = content(path), tokenizer.eod is not None
    depends_on = [suffixes_of(Path(path)), read, asdict(SplitOptions()), tokenizer.eod, tokenizer.unique_identifiers]
    name = str(cache / f"{Path(path).name}-{xxhash.xxh3_128_hexdigest(json.dumps(depends_on).encode())}")
    prefix = f"{name}_text_document"
    if not Path(prefix + ".idx").exists():
        if not build:
            raise ValueError(
                f"--data-cache-path {cache}: {prefix}.idx, which rank 0 wrote, does not exist here; give a folder on a "
                "file system that all nodes share"
            )
        prepare_folder(cache, "--data-cache-path")
        logger.info(f"{flag} {path}: preprocessing into {prefix}")
        suffix, workers = suffixes_of(Path(path))[0], cores()
        found = list_sources([path], text_suffixes=[suffix] if suffix not in FORMATS else [])
        sources = [replace(source, content=read) for source in found]
        options = PreprocessOptions(append_eod=append_eod, workers=workers, resume=True)
        try:
            preprocess(sources, name, data, SplitOptions(), options)
        except OSError as error:
            raise ValueError(
                f"--data-cache-path {cache}: {path} cannot be preprocessed into it: {error.__cause__ or error}"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{flag} {path} is text that cannot be preprocessed by itself: {error} (a flag of "
                f"tools/preprocess_data.py: run it on this text and give its output as {flag})"
            ) from error
        if content(path) != read:
            Path(prefix + ".idx").unlink()
            raise ValueError(f"{flag} {path} changed while it was preprocessed: run again once it is complete")
    return prefix
