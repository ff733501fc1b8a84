"""Exports in the hands of others: transformers' tensor parallelism, and vLLM where ``VLLM_PYTHON`` names a Python that
has it (docs/serving.md)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from integration_runs import ROOT, torchrun

sys.path.append(str(ROOT / "tests/unit/hf"))
from hf_models import make_config, randomize  # noqa: E402

from mesh_megatron.hf.modeling_mesh import MeshForCausalLM  # noqa: E402

LAYERS = {
    "mesh": {"num_loops": 3},
    "swiglu": {"swiglu": True, "linear_bias": False, "normalization": "RMSNorm", "num_key_value_heads": 2},
    "swiglu with biases": {"swiglu": True},
}


def export(folder: Path, **changes) -> MeshForCausalLM:
    model = MeshForCausalLM(make_config(**changes)).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "layers", ["mesh", *(pytest.param(name, marks=pytest.mark.full) for name in ("swiglu", "swiglu with biases"))]
)
def test_two_ranks_share_an_export(tmp_path: Path, layers: str) -> None:
    """Biases of every kind included: ``randomize`` leaves none at zero."""
    model = export(tmp_path / "export", **LAYERS[layers])
    script = ROOT / "tests/integration/tensor_parallel_export.py"
    run = torchrun(2, script, tmp_path / "export", tmp_path / "result", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr
    rows = model.model.core[0].attention.query_key_value.weight.shape[0]
    for rank in range(2):
        found = json.loads((tmp_path / f"result.{rank}").read_text())
        assert found["rows"] == rows // 2 and found["difference"] < 1e-5 and found["same tokens"]


VLLM = """if True:
    import json, sys
    from vllm import LLM, SamplingParams
    folder, mode, result = sys.argv[1:]
    if __name__ == "__main__":
        llm = LLM(
            folder, model_impl="transformers", trust_remote_code=True, skip_tokenizer_init=True, dtype="float32",
            enforce_eager=mode == "eager", max_model_len=48, max_num_seqs=4,
        )
        prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (3, 9, 20)]
        settings = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1, detokenize=False)
        found = [
            {"prompt": o.prompt_token_ids, "tokens": list(o.outputs[0].token_ids),
             "logprobs": [step[token].logprob for step, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids)]}
            for o in llm.generate(prompts, settings)
        ]
        open(result, "w").write(json.dumps(found))
"""


@pytest.mark.long
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no Python that has vLLM")
@pytest.mark.parametrize("changes", [{}, {"num_loops": 3}, {"share_core": False}, {"recurrence": "anchor_emb"}])
def test_vllm_gives_the_same_tokens_and_probabilities(tmp_path: Path, changes: dict) -> None:
    model = export(tmp_path / "export", hidden_size=128, **changes)  # its attention wants heads of 32
    (tmp_path / "serve.py").write_text(VLLM)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    command = [os.environ["VLLM_PYTHON"], "serve.py", str(tmp_path / "export"), "eager", "result.json"]
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **environment, "PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for answer in json.loads((tmp_path / "result.json").read_text()):
        prompt, tokens = answer["prompt"], answer["tokens"]
        with torch.no_grad():
            scores = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert scores.argmax(-1).tolist() == tokens
        expected = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer["logprobs"]), expected, rtol=0, atol=2e-6)
