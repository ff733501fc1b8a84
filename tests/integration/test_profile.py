"""--profile: a trace of the chosen steps, with the modules of the model by name."""

import json

import pytest
from megatron.core.utils import nvtx_range_pop, nvtx_range_push

pytestmark = pytest.mark.full


def test_a_trace_of_the_steps_asked_for(train, tmp_path, monkeypatch):
    ranges: list[str] = []
    monkeypatch.setattr("torch.cuda.nvtx.range_push", ranges.append)
    monkeypatch.setattr("torch.cuda.nvtx.range_pop", lambda: None)
    steps = ("--profile-step-start", 2, "--profile-step-end", 3)
    code, _, _ = train("--train-iters", 4, "--eval-iters", 0, "--save", tmp_path, "--profile", *steps)
    assert code == 0
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank0.json"]
    trace = json.loads((tmp_path / "profile" / "rank0.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    passes = ["prelude", "core, loop 0", "core, loop 1", "coda", "head"]
    micro_batches = 2
    assert [names.count(name) for name in passes] == [micro_batches] * len(passes)
    assert [name for name in ranges if name in passes] == passes * micro_batches  # NVTX: in these steps and no others
    nvtx_range_push("after")
    nvtx_range_pop("after")
    assert "after" not in ranges
