"""The trainer's results on checkpoints, run under torchrun by test_hf_parity.py with a list of jobs.

Each job loads one checkpoint under one layout of ranks, evaluates it on given tokens and saves it again.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mesh_megatron.checkpoint.reader import find_checkpoint, read_run_config
from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.platform import device

if TYPE_CHECKING:
    from mesh_megatron.parallel.build_model import RankModel


def main(jobs: list[dict]) -> None:
    device.prepare()
    import torch.distributed as dist

    device.start_process_group()
    for job in jobs:
        run_job(job)
    dist.destroy_process_group()


def run_job(job: dict) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from mesh_megatron.parallel.build_model import build_model
    from mesh_megatron.parallel.groups import start_model_parallel
    from mesh_megatron.training.step import evaluation_sums, mean

    source, target = find_checkpoint(Path(job["load"])), Path(job["save"])
    run, resolved = read_run_config(source)
    run = replace(run, parallel=ParallelConfig(**job["parallel"]))
    start_model_parallel(run)
    model = build_model(run, resolved["padded_vocab_size"])
    loaded = dist_checkpointing.load(sharded_state(model), str(source))
    for i, module in enumerate(model.modules):
        module.load_state_dict(loaded.get(f"model{i}", {}), strict=False)  # a later loop of the ring owns nothing
    rows = torch.load(job["tokens"], weights_only=True)
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    batch = {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(labels.shape)}
    result = {"loss": mean(*evaluation_sums(model, iter([batch] * 2), 2, len(tokens)))}
    if len(model.chunks) == 1:
        with torch.no_grad():
            logits = model.modules[0](tokens)
        result["logits"] = gather_from_tensor_model_parallel_region(logits)
    if device.rank() == 0:
        (target / source.name).mkdir(parents=True)
        shutil.copyfile(source / "run_config.json", target / source.name / "run_config.json")
        torch.save(result, target / "result.pt")
    torch.distributed.barrier()
    dist_checkpointing.save(sharded_state(model), str(target / source.name))
    parallel_state.destroy_model_parallel()


def sharded_state(model: RankModel) -> dict:
    """All chunks' weights, without the state that only FP8 fills."""
    chunks = {f"model{i}": module.sharded_state_dict() for i, module in enumerate(model.modules)}
    return {
        name: {key: entry for key, entry in chunk.items() if not key.endswith("_extra_state")}
        for name, chunk in chunks.items()
    }


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
