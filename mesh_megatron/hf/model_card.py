"""The model card (README.md) of an exported model: use, architecture and training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from mesh_megatron.checkpoint.metrics_file import METRICS_FILE, read_metrics
from mesh_megatron.checkpoint.reader import CheckpointReader
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.recurrence import scheme_spec
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.hf.convert import StateDictAdapter

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: {licence}
tags: [{tags}]
---

# {title}

{kind}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{remote})
tokenizer = AutoTokenizer.from_pretrained("PATH"{remote})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
{note}
## Serve

```bash
vllm serve PATH{server}
curl http://localhost:8000/v1/completions -H "Content-Type: application/json" \\
  -d '{{"model": "PATH", "prompt": "Once upon a time", "max_tokens": 50}}'
```

Continuous batching serves it too, and so does `transformers serve`, which needs a starter for models with code of their
own: see docs/serving.md of mesh_megatron.

## Model

{model}

## Training

{training}
{curve}
Trained and exported with [Megatron-Core](https://github.com/NVIDIA/Megatron-LM) by mesh_megatron.
"""

_REMOTE_NOTE = """
`trust_remote_code` runs `modeling_mesh.py` from this folder: plain PyTorch and transformers, 5.4 or
newer. With `output_hidden_states=True` the output also has `loop_states`: the embedding, the state that
enters each loop, the state that enters the coda, and the coda's output.
"""


LOSS_FIGURE = "loss.png"
"""Name of the figure of losses in an exported folder."""


def _layers(number: int, kind: str = "") -> str:
    return f"{number} {kind} layer{'' if number == 1 else 's'}".replace("  ", " ")


def model_card(
    reader: CheckpointReader, adapter: StateDictAdapter, config: PreTrainedConfig, licence: str, figure: bool
) -> str:
    """Return the model card as Markdown, with the front matter that model hubs read.

    ``licence`` is its identifier there; ``figure`` says that ``LOSS_FIGURE`` is beside the card.
    """
    model, layout = adapter.model, adapter.model.segments
    if layout.loops > 1 and layout.shared:
        seen_in = scheme_spec(model).seen_in
        origin = f" of {seen_in}" if seen_in else ""
        kind = (
            f"A recursive transformer: {_layers(layout.core, 'core')} {'runs' if layout.core == 1 else 'run'} "
            f"{layout.loops} times between a prelude of {_layers(layout.prelude)} and a coda of {_layers(layout.coda)} "
            f"(layout `{model.layout}`). State passes between loops by the scheme `{model.recurrence}`{origin}."
        )
    else:
        layers = _layers(layout.computed_layers)
        kind = f"A transformer of {layers} (layout `{model.layout}`, scheme `{model.recurrence}`)."
    assert isinstance(config.dtype, torch.dtype)
    parameters = sum(math.prod(shape) for shape in adapter.shapes.values())
    return _CARD.format(
        tags=", ".join(["gpt_neox"] if adapter.native else ["mesh", "recursive-transformer", "custom_code"]),
        title=f"{model.recurrence} {model.layout}, {parameters / 1e6:.1f}M parameters",
        kind=kind,
        remote="" if adapter.native else ", trust_remote_code=True",
        note="" if adapter.native else _REMOTE_NOTE,
        model=_table(_model_rows(adapter, parameters, config.dtype)),
        training=_table(_training_rows(reader)),
        licence=licence,
        server=_server_flags(adapter.native, config.dtype),
        curve=f"\n![Training and validation loss]({LOSS_FIGURE})\n" if figure else "",
    )


def _server_flags(native: bool, dtype: torch.dtype) -> str:
    """Return what ``vllm serve`` needs for this model; without a dtype it rounds float32 to 16 bits."""
    code = "" if native else " --model-impl transformers --trust-remote-code"
    return code + (" --dtype float32" if dtype == torch.float32 else "")


def _model_rows(adapter: StateDictAdapter, parameters: int, dtype: torch.dtype) -> dict[str, Any]:
    model, precision = adapter.model, str(dtype).removeprefix("torch.")
    keys_and_values = 2 * model.cached_layers * model.query_groups * model.head_size
    embeddings = adapter.vocabulary * model.hidden_size * (2 if model.untie_embeddings_and_output_weights else 1)
    return {
        "parameters": f"{parameters:,}",
        "of them not embeddings": f"{parameters - embeddings:,}",
        "computed layers": model.segments.computed_layers,
        "hidden size": model.hidden_size,
        "attention heads": model.num_attention_heads,
        "feed-forward size": model.ffn_size,
        "vocabulary rows": adapter.vocabulary,
        "training sequence": model.seq_length,
        "key-value cache": f"{keys_and_values * dtype.itemsize:,} bytes per token in {precision}",
        **_scheme_rows(model),
        **({"exit gate": '`exit_criterion="gate"`'} if model.exit_gate else {}),
    }


def _scheme_rows(model: ModelConfig) -> dict[str, int]:
    """Return the sizes among the settings of the recurrence scheme."""
    settings = scheme_spec(model).settings()
    sizes = {name: value for name, value in settings.items() if isinstance(value, int)}
    return {name.removeprefix("num_").replace("_", " "): value for name, value in sizes.items()}


def _training_rows(reader: CheckpointReader) -> dict[str, Any]:
    run, resolved = reader.config, reader.resolved
    return {
        "iterations": resolved.get("iteration"),
        "tokens": f"{resolved.get('consumed_tokens') or 0:,}",
        **_losses(reader.folder.parent / METRICS_FILE, resolved.get("iteration")),
        "data": ", ".join(_data_names(run)) or "not named",
        "optimizer": f"{_optimizer(run.training)}, weight decay {run.training.weight_decay}",
        "learning rate": f"{run.training.lr:g}, {run.training.lr_decay_style}",
        "global batch": run.training.global_batch_size or "not given",
        "precision": run.training.precision,
        "seed": run.training.seed,
    }


def _optimizer(training: TrainingConfig) -> str:
    adam = f"AdamW, betas {training.adam_beta1}/{training.adam_beta2}"
    return {
        "adam": adam,
        "sgd": f"SGD, momentum {training.sgd_momentum}",
        "muon": f"Muon, momentum {training.muon_momentum}, for the matrices of layers; the others {adam}",
    }[training.optimizer]


def _losses(metrics: Path, iteration: int | None) -> dict[str, str]:
    """Read the latest training and validation losses that were logged up to ``iteration``."""
    newest: dict[str, float] = {}
    if iteration is None or not metrics.is_file():
        return {}
    for row in read_metrics(metrics):
        if row.get("iteration", iteration + 1) <= iteration:
            newest |= {name: value for name, value in row.items() if name.startswith("lm loss")}
    return {name: f"{value:.4f}" for name, value in newest.items() if isinstance(value, float)}


def _data_names(run: RunConfig) -> list[str]:
    """Return the names of the training data, without their folders."""
    items = run.data.data_path or run.data.train_data_path
    return [item if _is_number(item) else Path(item).name for item in items]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
