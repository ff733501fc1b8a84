"""Compare an export split over the ranks of torchrun with the same on one: logits and generated tokens."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(folder: str, result: str) -> None:
    def load(**options):
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()

    split, alone, ids = load(tp_plan="auto"), load(), torch.arange(24).view(2, 12)
    layer = split.model.core[0]
    matrices = (layer.attention.query_key_value, layer.mlp.dense_h_to_4h)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = {
        "rows": [len(matrix.weight.to_local()) for matrix in matrices],
        "difference": (split(ids).logits - alone(ids).logits).abs().max().item(),
        "same tokens": torch.equal(split.generate(ids, **settings), alone.generate(ids, **settings)),
    }
    Path(f"{result}.{dist.get_rank()}").write_text(json.dumps(found))
    dist.destroy_process_group()


main(*sys.argv[1:])
