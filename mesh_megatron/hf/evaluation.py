"""Evaluate a loaded model: perplexity of data, and tasks of the LM Evaluation Harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mesh_megatron.hf.loading import LoadedModel
from mesh_megatron.hf.perplexity import Perplexity, stream_nats
from mesh_megatron.hf.token_streams import token_ids


def data_perplexity(
    loaded: LoadedModel, name: str, stream: np.ndarray | str, window: int, stride: int, batch_size: int
) -> Perplexity:
    """Compute the perplexity of one stream: token ids, the first of which is only input, or a text.

    A text is preceded by the end-of-document token. Words are separated by white space, bytes are UTF-8; for token ids
    both are counted in the decoded documents. Raises ``ValueError`` if the stream does not fit the model.
    """
    ids = token_ids(loaded, name, stream)
    if isinstance(stream, str):
        texts = [stream]
    else:
        texts = [] if loaded.tokenizer is None else decoded_documents(loaded, ids[1:])
    rows = loaded.model.config.vocab_size
    largest = int(np.max(ids)) if len(ids) > 1 else 0
    if len(ids) < 2 or largest >= rows:
        problem = f"token {largest}, the model knows {rows}" if largest else "fewer than two tokens"
        raise ValueError(f"--data-path {name}: holds {problem}")
    nats, tokens = stream_nats(loaded.model, ids, window, stride, batch_size, progress=True)
    if not texts:
        return Perplexity(nats, tokens)
    words, size = sum(len(text.split()) for text in texts), sum(len(text.encode("utf-8")) for text in texts)
    return Perplexity(nats, tokens, words=words, bytes=size)


def decoded_documents(loaded: LoadedModel, ids: np.ndarray) -> list[str]:
    """Return the text of each document of a stream, exactly: neither joined to the next one nor cleaned up."""
    cuts: Any = [] if loaded.eod is None else np.flatnonzero(np.asarray(ids) == loaded.eod)
    return [
        loaded.tokenizer.decode(part.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in np.split(ids, cuts)
    ]


def run_tasks(
    loaded: LoadedModel,
    tasks: Sequence[str],
    batch_size: int,
    num_fewshot: int | None,
    include_path: Path | None,
    limit: int | None,
) -> dict[str, dict[str, Any]]:
    """Run tasks with the LM Evaluation Harness; return task name -> metrics, ``ValueError`` for unknown tasks."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError("--tasks needs the LM Evaluation Harness: pip install 'mesh-megatron[eval]'") from error
    if loaded.tokenizer is None:
        raise ValueError(f"--tasks {' '.join(tasks)}: the model has no tokenizer")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(
            f"--tasks {' '.join(unknown)}: no such task; lm_eval ls tasks lists them, --include-path adds yours"
        )
    harness = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    report = simple_evaluate(
        harness, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
    )
    assert report is not None  # None is for ranks above 0
    return {name: dict(metrics) for name, metrics in report["results"].items()}
