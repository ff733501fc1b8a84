"""Exports in the hands of others: transformers' tensor parallelism, and vLLM where ``VLLM_PYTHON`` names a Python that
has it (docs/serving.md)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from integration_runs import ROOT, torchrun
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

sys.path.append(str(ROOT / "tests/unit/hf"))
from hf_models import make_config, randomize  # noqa: E402

from mesh_megatron.hf.modeling_mesh import MeshForCausalLM  # noqa: E402

LAYERS = {
    "mesh": {"num_loops": 3},
    "swiglu": {"swiglu": True, "linear_bias": False, "normalization": "RMSNorm", "num_key_value_heads": 2},
    "swiglu with biases": {"swiglu": True},
}


def export(folder: Path, scale: float = 1.0, **changes) -> MeshForCausalLM:
    """Export a model of random weights; its matrices are multiplied by ``scale``."""
    model = MeshForCausalLM(make_config(**changes)).eval()
    randomize(model)
    for parameter in model.parameters():
        parameter.data.mul_(scale if parameter.dim() == 2 else 1.0)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "layers",
    [
        "mesh",
        pytest.param("swiglu with biases", marks=pytest.mark.full),
        pytest.param("swiglu", marks=[pytest.mark.full, pytest.mark.long]),
    ],
)
def test_two_ranks_share_an_export(tmp_path: Path, layers: str) -> None:
    """Biases of every kind included: ``randomize`` leaves none at zero."""
    model = export(tmp_path / "export", **LAYERS[layers])
    script = ROOT / "tests/integration/tensor_parallel_export.py"
    run = torchrun(2, script, tmp_path / "export", tmp_path / "result", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr
    layer = model.model.core[0]
    rows = [len(matrix.weight) // 2 for matrix in (layer.attention.query_key_value, layer.mlp.dense_h_to_4h)]
    for rank in range(2):
        found = json.loads((tmp_path / f"result.{rank}").read_text())
        assert found["rows"] == rows and found["difference"] < 1e-5 and found["same tokens"]


# Every start of vLLM imports it in each of its processes, and the compiled mode builds some ten C++ kernels per model:
# each mode serves one model for all questions, and one process takes the other schemes in turn.
LONG_VLLM = [
    pytest.mark.long,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no Python that has vLLM"),
]
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": ""}
VLLM = """if __name__ == "__main__":  # with tensor parallelism each rank imports this file
    import json, sys
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    mode, *folders = sys.argv[1:]
    for folder in folders:
        llm = LLM(
            folder, model_impl="transformers", trust_remote_code=True, skip_tokenizer_init=True, dtype="float32",
            enforce_eager=mode != "compiled", tensor_parallel_size=2 if mode == "two ranks" else 1,
            max_model_len=48, max_num_seqs=4,
        )
        prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (3, 9, 20)]
        settings = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1, detokenize=False)
        found = [
            {"prompt": o.prompt_token_ids, "tokens": list(o.outputs[0].token_ids),
             "logprobs": [step[token].logprob for step, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids)]}
            for o in llm.generate(prompts, settings)
        ]
        open(folder + "/found.json", "w").write(json.dumps(found))
        del llm
        cleanup_dist_env_and_memory()
"""
SHARED_KEYS = {"num_loops": 3, "share_kv_across_loops": True}
TWO_PRELUDE = {"num_prelude_layers": 2, "num_core_layers": 1}


@torch.no_grad()
def check_answer(model: MeshForCausalLM, prompt: list[int], tokens: list[int], logprobs: list[float]) -> None:
    """Compare a greedy continuation of ``prompt`` and its log-probabilities with one forward pass in float32."""
    scores = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert scores.argmax(-1).tolist() == tokens
    expected = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=5e-6)


class TestVllm:
    pytestmark = LONG_VLLM

    @pytest.mark.parametrize(
        ("mode", "models"),
        [
            ("eager", [{"share_core": False}, {"recurrence": "anchor_emb"}, {"num_key_value_heads": 2}, SHARED_KEYS]),
            # Smaller matrices: at full size float32 rounding moves this scheme's log-probabilities by 1e-5 of itself.
            ("compiled", [TWO_PRELUDE | {"recurrence": "dynamic", "scale": 0.25}]),
            ("compiled", [SHARED_KEYS]),
            ("two ranks", [LAYERS["mesh"]]),
            ("two ranks", [LAYERS["swiglu with biases"]]),
        ],
    )
    def test_the_same_tokens_and_probabilities(self, tmp_path: Path, mode: str, models: list[dict]) -> None:
        """In float32, and greedy, from Python."""
        exported = {  # its attention wants heads of 32
            tmp_path / str(i): export(tmp_path / str(i), hidden_size=128, **changes) for i, changes in enumerate(models)
        }
        (tmp_path / "serve.py").write_text(VLLM)
        command = [os.environ["VLLM_PYTHON"], "serve.py", mode, *map(str, exported)]
        environment = os.environ | VLLM_ENVIRONMENT
        if mode == "two ranks":
            first, second, *_ = sorted(os.sched_getaffinity(0))
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}  # a core each, on one NUMA node
        else:
            environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        for folder, model in exported.items():
            for answer in json.loads((folder / "found.json").read_text()):
                check_answer(model, answer["prompt"], answer["tokens"], answer["logprobs"])


class TestVllmServer:
    """vLLM's OpenAI-compatible server, asked as docs/serving.md does.

    Compiled, three loops after two prelude layers are what was wrong once.
    """

    pytestmark = LONG_VLLM
    PROMPT = "def main("
    MORE = {"ignore_eos": True, "return_token_ids": True}

    @pytest.fixture(scope="class", params=["eager", "compiled"])
    def served(self, request, tmp_path_factory) -> Iterator[tuple[MeshForCausalLM, str]]:
        """A model with a tokenizer of bytes, and the address at which vLLM serves it."""
        folder, port = tmp_path_factory.mktemp("served"), free_port()
        tokenizer = byte_tokenizer()
        model = export(folder / "export", hidden_size=128, vocab_size=len(tokenizer), num_loops=3, **TWO_PRELUDE)
        tokenizer.save_pretrained(folder / "export")
        command = [
            os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "export"),
            "--model-impl", "transformers", "--trust-remote-code", "--dtype", "float32", "--max-model-len", "48",
            "--max-num-seqs", "4", "--served-model-name", "mesh", "--host", "127.0.0.1", "--port", str(port),
            *(["--enforce-eager"] if request.param == "eager" else []),
        ]  # fmt: skip
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(
                command, cwd=folder, env=os.environ | VLLM_ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_until_answers(f"http://127.0.0.1:{port}/health", server, folder / "log")
            yield model, f"http://127.0.0.1:{port}/v1"
        finally:
            for ending in (signal.SIGTERM, signal.SIGKILL):  # a busy machine has needed the second one
                if server.poll() is None:
                    os.killpg(server.pid, ending)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        server.wait(60)

    def generated(self, model: MeshForCausalLM) -> list[int]:
        ids = list(self.PROMPT.encode())
        answer = model.generate(torch.tensor([ids]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        return answer[0, len(ids) :].tolist()

    def curl(self, address: str, prompt: str | list[int], **more) -> dict:
        """Ask with curl for 12 greedy tokens; returns the answer's first choice."""
        request = {"model": "mesh", "prompt": prompt, "max_tokens": 12, "temperature": 0, **self.MORE, **more}
        command = ["curl", "-s", f"{address}/completions", "-H", "Content-Type: application/json", "-d"]
        run = subprocess.run([*command, json.dumps(request)], capture_output=True, text=True, check=True)
        return json.loads(run.stdout)["choices"][0]

    def test_curl_gets_the_tokens_of_generate(self, served) -> None:
        model, address = served
        choice = self.curl(address, self.PROMPT)
        assert (choice["prompt_token_ids"], choice["token_ids"]) == (list(self.PROMPT.encode()), self.generated(model))

    def test_the_openai_client_gets_the_tokens_of_generate(self, served) -> None:
        model, address = served
        client = f"""if True:
            from openai import OpenAI
            client = OpenAI(base_url={address!r}, api_key="none")
            answer = client.completions.create(
                model="mesh", prompt={self.PROMPT!r}, max_tokens=12, temperature=0, extra_body={self.MORE!r}
            )
            print(answer.choices[0].token_ids)
        """
        command = [os.environ["VLLM_PYTHON"], "-c", client]
        run = subprocess.run(command, env=os.environ | VLLM_ENVIRONMENT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout) == self.generated(model)

    def test_log_probabilities_are_the_models(self, served) -> None:
        model, address = served
        for length in (3, 9, 20):
            choice = self.curl(address, list(range(5, 5 + length)), logprobs=1)
            check_answer(model, choice["prompt_token_ids"], choice["token_ids"], choice["logprobs"]["token_logprobs"])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the bytes of ASCII texts, and an end of text after them."""
    alphabet = sorted(ByteLevel.alphabet())
    order = {
        character: byte
        for byte in range(128)
        for character in ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(byte))[0][0]
    }
    vocabulary = order | {character: 128 + i for i, character in enumerate(c for c in alphabet if c not in order)}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_answers(address: str, server: subprocess.Popen, log: Path, seconds: int = 1800) -> None:
    """Wait for a server to compile and start; fail with the end of its log when it has ended or takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            with urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(log.read_text()[-4000:])
