"""Build each model of a JSON list on one process and print how many parameters its parts have."""

from __future__ import annotations

import json
import sys

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.platform import device

PARTS = ("embedding", "prelude", "core", "coda", "final_norm", "recurrence")
ROWS = 128


def count(run: RunConfig) -> dict[str, int]:
    from mesh_megatron.model.transformer_config import transformer_config
    from mesh_megatron.parallel.build_model import build_modules

    (model,) = build_modules(run, transformer_config(run.model, run.parallel), ROWS)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = {part: sum(size for name, size in sizes.items() if name.startswith(part + ".")) for part in PARTS}
    counts["embedding"] += sizes.get("output_layer.weight", 0)
    return {"total": sum(sizes.values())} | counts


if __name__ == "__main__":
    device.prepare()
    from mesh_megatron.parallel.groups import start_model_parallel

    device.start_process_group()
    start_model_parallel(RunConfig())
    print(json.dumps([count(RunConfig(model=ModelConfig(**model))) for model in json.loads(sys.argv[1])]))
