"""Exported models against the trainer's own evaluation forward: every scheme and backbone, several layouts of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit" / "hf"))

from hf_checkpoints import VOCABULARY, tiny, write_checkpoint  # noqa: E402

from mesh_megatron.checkpoint.reader import CheckpointReader  # noqa: E402
from mesh_megatron.hf.export import Exporter  # noqa: E402

MODELS = {
    "mesh": tiny(),
    "mesh normalized K=3": tiny(layout="1+1R3+1", router_input="normalized", num_memory_slots=4),
    "mesh sigmoid": tiny(
        router_gate="sigmoid", router_input="rmsnorm", router_scale=0.01, router_temperature=2.0,
        router_init="anchor_emb", router_init_std=0.0,
    ),
    "mesh scaled": tiny(router_scale=0.5, router_temperature=0.5, router_init="sum"),
    "vanilla+mesh": tiny(recurrence="vanilla+mesh"),
    "vanilla": tiny(layout="4", recurrence="vanilla"),
    "vanilla sequential unscaled": tiny(
        layout="1+2+2+1", recurrence="vanilla", parallel_residual=False, embedding_scaling=False
    ),
    "vanilla tied": tiny(layout="4", recurrence="vanilla", untie_embeddings_and_output_weights=False),
    "base": tiny(recurrence="base"),
    "residual": tiny(recurrence="residual"),
    "anchor": tiny(recurrence="anchor"),
    "anchor_emb": tiny(recurrence="anchor_emb"),
    "residual+anchor": tiny(recurrence="residual+anchor"),
    "anchor+anchor_emb": tiny(recurrence="anchor+anchor_emb"),
    "residual+anchor+anchor_emb": tiny(recurrence="residual+anchor+anchor_emb"),
    "static": tiny(recurrence="static"),
    "dynamic": tiny(recurrence="dynamic"),
    "adapter": tiny(recurrence="adapter"),
    "decay": tiny(recurrence="decay"),
    "decay linear": tiny(recurrence="decay", decay_input="linear"),
    "hyper": tiny(recurrence="hyper", hyper_lanes=3),
    "hyper-dynamic": tiny(recurrence="hyper-dynamic"),
    "attend": tiny(recurrence="attend"),
    "loop norm, loop embedding": tiny(recurrence="hyper", loop_norm=True, loop_embedding=True),
    "per-loop norms": tiny(per_loop_norms=True),
    "exit gate": tiny(recurrence="anchor", exit_gate=True),
    "differences of loops": tiny(loop_lora_rank=3, swiglu=True, num_query_groups=2),
    "differences of loops, sequential": tiny(loop_lora_rank=3, parallel_residual=False),
    "shared keys": tiny(share_kv_across_loops=True, layout="1+2R3+1", num_query_groups=2, qk_layernorm=True),
    "shared keys, differences of loops": tiny(share_kv_across_loops=True, loop_lora_rank=3, parallel_residual=False),
    "sandwich norms": tiny(sandwich_norm=True, per_loop_norms=True),
    "sandwich norms, sequential": tiny(sandwich_norm=True, parallel_residual=False, normalization="RMSNorm"),
    "llama-like": tiny(
        normalization="RMSNorm", swiglu=True, disable_bias_linear=True, rotary_percent=1.0,
        parallel_residual=False, num_query_groups=2, ffn_hidden_size=48,
    ),
    "swiglu with biases": tiny(swiglu=True, num_query_groups=2, kv_channels=16, recurrence="anchor"),
    "biases of queries, keys and values": tiny(disable_bias_linear=True, add_qkv_bias=True, normalization="RMSNorm"),
    "interpolated positions": tiny(rotary_seq_len_interpolation_factor=4.0, rotary_percent=1.0),
    "frequencies of Llama 3.1, with dropout": tiny(
        use_rope_scaling=True, rope_scaling_factor=32.0, hidden_dropout=0.1, attention_dropout=0.1
    ),
    "normalised heads": tiny(qk_layernorm=True, num_query_groups=2),
    "normalised heads by RMS": tiny(qk_layernorm=True, normalization="RMSNorm", recurrence="anchor"),
}  # fmt: skip
TENSOR = {"tensor_model_parallel_size": 2}
RING = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    1: [(name, {}) for name in MODELS],
    2: [
        ("mesh", TENSOR | {"sequence_parallel": True}),
        ("mesh", RING),
        ("mesh sigmoid", TENSOR | {"sequence_parallel": True}),
        ("mesh sigmoid", RING),
        ("llama-like", TENSOR),
        ("llama-like", RING),
        ("vanilla", RING),
        ("vanilla+mesh", RING),
        ("dynamic", TENSOR | {"sequence_parallel": True}),
        ("static", RING),
        ("adapter", TENSOR | {"sequence_parallel": True}),
        ("hyper-dynamic", RING),
        ("loop norm, loop embedding", TENSOR | {"sequence_parallel": True}),
        ("per-loop norms", TENSOR | {"sequence_parallel": True}),
        ("per-loop norms", RING),
        ("differences of loops", TENSOR | {"sequence_parallel": True}),
        ("differences of loops, sequential", TENSOR),
        ("differences of loops", RING),
        ("sandwich norms", TENSOR | {"sequence_parallel": True}),
        ("sandwich norms, sequential", RING),
        ("swiglu with biases", TENSOR),
        ("normalised heads", TENSOR),
    ],
}


def slug(name: str, parallel: dict) -> str:
    return "-".join([name.replace(" ", "_"), *(f"{key.split('_')[0]}{int(value)}" for key, value in parallel.items())])


CASES = [(name, parallel) for cases in LAYOUTS.values() for name, parallel in cases]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """A folder with a checkpoint and a result by the trainer for every case."""
    folder = tmp_path_factory.mktemp("parity")
    rows = torch.randint(0, VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(3))
    torch.save(rows, folder / "rows.pt")
    for name, model in MODELS.items():
        write_checkpoint(folder / "random" / slug(name, {}), model)
    for ranks, cases in LAYOUTS.items():
        jobs = [
            {
                "load": str(folder / "random" / slug(name, {})),
                "save": str(folder / slug(name, parallel)),
                "tokens": str(folder / "rows.pt"),
                "parallel": parallel,
            }
            for name, parallel in cases
        ]
        (folder / f"jobs{ranks}.json").write_text(json.dumps(jobs))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [str(ROOT / "tests/integration/hf_trainer.py"), str(folder / f"jobs{ranks}.json")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.full
@torch.no_grad()
@pytest.mark.parametrize(("name", "parallel"), CASES, ids=[slug(*case) for case in CASES])
def test_export_equals_the_trainers_forward(evaluated, tmp_path, name, parallel):
    trained = evaluated / slug(name, parallel)
    exporter = Exporter(CheckpointReader(next(trained.glob("iter_*"))))
    (tmp_path / "export").mkdir()
    exporter.write(tmp_path / "export")
    native = {"vanilla", "vanilla sequential unscaled"}
    assert exporter.adapter.native == (name in native)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=name not in native)
    assert type(model).__name__ == ("GPTNeoXForCausalLM" if name in native else "MeshForCausalLM")
    rows = torch.load(evaluated / "rows.pt", weights_only=True)
    expected = torch.load(trained / "result.pt", weights_only=True)
    out = model(rows[:, :-1])
    if "logits" in expected:
        torch.testing.assert_close(out.logits, expected["logits"], rtol=0, atol=1e-5)
    else:
        assert "pipeline_model_parallel_size" in parallel
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), rows[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(("name", "parallel"), CASES, ids=[slug(*case) for case in CASES])
def test_every_layout_exports_the_same_tensors(evaluated, tmp_path, name, parallel):
    """The trainer loaded a checkpoint and saved it again under a layout: nothing may have moved."""
    exports = []
    for source in (evaluated / "random" / slug(name, {}), evaluated / slug(name, parallel)):
        folder = tmp_path / str(len(exports))
        folder.mkdir()
        Exporter(CheckpointReader(next(source.glob("iter_*")))).write_weights(folder)
        exports.append(load_file(folder / "model.safetensors"))
    first, second = exports
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
