"""tools/probe.py as a user runs it, on what the trainer has just trained."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integration_runs import ROOT, SMALL
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

pytestmark = pytest.mark.full

SEQUENCE, ROWS = 32, 384


def run_tool(name: str, *flags: object) -> int:
    """Exit status of a tool, run in this process: the libraries are imported already."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", [name, *map(str, flags)])
        runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    return exit.value.code


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory) -> Path:
    """A trained mesh and a trained vanilla, the mesh's export, and a plain model of somebody else's."""
    import pretrain_mesh

    folder = tmp_path_factory.mktemp("probes")
    for scheme in ("mesh", "vanilla"):
        flags = ["--recurrence", scheme, "--layout", "1+1R2+1", "--train-iters", "10", "--save", str(folder / scheme)]
        assert pretrain_mesh.main([*SMALL, "--data-path", corpus, *flags]) == 0
    assert run_tool("export_hf.py", "--load", folder / "mesh", "--output", folder / "export") == 0
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 5, "intermediate_size": 64}
    plain = GPTNeoXConfig(vocab_size=ROWS, max_position_embeddings=2 * SEQUENCE, **sizes)
    GPTNeoXForCausalLM(plain).save_pretrained(folder / "plain")
    (folder / "short.txt").write_text("too short")
    return folder


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "probe.json").read_text())


def test_checkpoint_export_and_plain_models_side_by_side(place, corpus, tmp_path, capsys):
    loads = [place / name for name in ("mesh", "export", "vanilla", "plain")]
    flags = ["--load", *loads, "--data", corpus, "--samples", 12, "--output", tmp_path / "out", "--tokens", 3]
    assert run_tool("probe.py", *flags) == 0
    captured = capsys.readouterr()
    report = read(tmp_path / "out")
    models = report["models"]
    assert list(models) == ["mesh", "export", "vanilla", "plain"] and report["seq_length"] == SEQUENCE
    assert {numbers["samples"] for numbers in models.values()} == {12}
    same = {key: value for key, value in models["export"].items() if key != "load"}
    assert same == {key: value for key, value in models["mesh"].items() if key != "load"}
    assert models["vanilla"]["blocks"] == ["prelude", "loop 0", "loop 1", "coda"], "expected the blocks of training"
    assert models["plain"]["blocks"] == ["prelude", "coda"]
    assert models["mesh"]["routers"]["by_token"][0]["text"] == " " and models["vanilla"]["routers"] is None
    figures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert figures == {path.stem for path in (tmp_path / "out").glob("*.svg")} >= {"update_magnitude", "cka", "routers"}
    assert "mesh: 12 samples | loss before and after each loop" in captured.out
    assert "12/12" in captured.err and "<00:00" in captured.err, "progress and time left"


def test_exits_at_two_thresholds(corpus, tmp_path, capsys):
    import pretrain_mesh

    more = tmp_path / "more"
    length = ["--layout", "1+1R4+1", "--train-iters", "2", "--save", str(more)]
    assert pretrain_mesh.main([*SMALL, "--data-path", corpus, *length]) == 0
    exits = ["--exit-criterion", "change", "--exit-thresholds", "1e9", "1e-9"]
    flags = ["--data", corpus, *exits, "--samples", 4, "--output", tmp_path / "out"]
    assert run_tool("probe.py", "--load", more, *flags) == 0
    numbers = read(tmp_path / "out")["models"]["more"]
    soon, never = numbers["exits"]["thresholds"]
    assert soon["loops"] == 2 and soon["shares"] == [0, 1, 0, 0]
    assert never["loops"] == 4 and never["loss"] == pytest.approx(numbers["loss"]["mean"][-1], rel=1e-5)
    assert soon["loss"] != never["loss"]
    assert "exits below 1e+09: 2.00 loops, loss" in capsys.readouterr().out

    request = ["--load", more, "--prompt", "import os", "--max-new-tokens", 4, "--exit-criterion", "change"]
    assert run_tool("generate.py", *request, "--exit-threshold", "1e9") == 0
    assert "import os" in capsys.readouterr().out
    assert run_tool("generate.py", *request) != 0
    assert "--exit-criterion and its threshold belong together" in capsys.readouterr().err


def test_a_gate_from_both_stages_to_text(corpus, tmp_path, capsys):
    """Trained with the model, then alone from that checkpoint; exported; tokens leave where it says."""
    import pretrain_mesh

    gate = [*SMALL, "--data-path", corpus, "--layout", "1+1R4+1", "--exit-gate", "--train-iters", "2"]
    assert pretrain_mesh.main([*gate, "--save", str(tmp_path / "first")]) == 0
    assert pretrain_mesh.main([*gate, "--exit-gate-only"]) == 2
    assert "--exit-gate-only without a checkpoint" in capsys.readouterr().err
    alone = ["--exit-gate-only", "--finetune", "--load", str(tmp_path / "first"), "--save", str(tmp_path / "second")]
    assert pretrain_mesh.main([*gate, *alone]) == 0
    assert re.search(r"lm loss [\d.]+ \| exit loop [1-4]\.\d+ \|", capsys.readouterr().out)
    first, second = (
        [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()]
        for stage in ("first", "second")
    )
    for record in (first[0], second[0]):
        assert sum(record[f"exit share/loop {loop}"] for loop in range(1, 5)) == pytest.approx(1, abs=1e-6)
        assert record["exit loop"] > 1 and record["exit entropy"] > 0 and "loop loss/loop 4" in record
    assert "exit gate loss" in second[0] and "exit gate loss" not in first[0]
    evaluated = [records[-1]["lm loss validation"] for records in (first, second)]
    assert evaluated[0] == evaluated[1], "the second stage changes no loss of the complete model"

    assert run_tool("export_hf.py", "--load", tmp_path / "second", "--output", tmp_path / "export") == 0
    exits = ["--exit-criterion", "gate", "--exit-thresholds", "1e-9", "1.0"]
    flags = ["--data", corpus, *exits, "--samples", 4, "--output", tmp_path / "out"]
    assert run_tool("probe.py", "--load", tmp_path / "export", *flags) == 0
    soon, never = read(tmp_path / "out")["models"]["export"]["exits"]["thresholds"]
    assert (soon["loops"], never["loops"]) == (1, 4) and soon["loss"] != never["loss"]
    assert "exits at 1e-09: 1.00 loops, loss" in capsys.readouterr().out
    request = ["--load", tmp_path / "export", "--prompt", "import os", "--max-new-tokens", 4, *exits[:2]]
    assert run_tool("generate.py", *request, "--exit-threshold", "0.6") == 0
    assert "import os" in capsys.readouterr().out
    assert run_tool("generate.py", *request, "--exit-threshold", "2") != 0
    assert "is a probability: use at most 1" in capsys.readouterr().err


def write_windows(prefix: Path, count: int) -> None:
    """A .bin/.idx of ``count`` windows."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    ids = torch.from_numpy(np.random.default_rng(0).integers(32, 127, count * SEQUENCE + 1))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def test_losses_are_those_of_evaluation(place, tmp_path):
    """With as many samples as windows, the last readout equals the loss of tools/evaluate.py."""
    write_windows(tmp_path / "few", 7)
    few = ["--data-path", tmp_path / "few"]
    assert run_tool("evaluate.py", "--load", place / "mesh", *few, "--output", tmp_path / "new" / "loss.json") == 0
    [evaluated] = json.loads((tmp_path / "new" / "loss.json").read_text()).values()
    assert run_tool("probe.py", "--load", place / "mesh", *few, "--output", tmp_path / "out") == 0
    mesh = read(tmp_path / "out")["models"]["mesh"]
    assert mesh["samples"] == 7
    assert mesh["loss"]["mean"][-1] == pytest.approx(evaluated["loss"], abs=1e-5)


@pytest.mark.parametrize("scheme", ["mesh", "residual"])
def test_training_logs_what_the_tool_finds(train, tmp_path, scheme):
    """One step over the whole of a data set, too small to change a weight, and the tool over the same windows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_windows(tmp_path / "few", 4)
    flags = ["--recurrence", scheme, "--lr", 1e-30, "--init-method-std", 0.1, "--probe-interval", 1, "--split", "1,0,0"]
    code, _, err = train(
        *flags, "--train-iters", 1, "--eval-iters", 0, "--save", tmp_path / "run", data=str(tmp_path / "few")
    )
    assert code == 0, err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    [logged] = [record for record in map(json.loads, lines) if "state norm/h_emb" in record]
    probed = ["--load", tmp_path / "run", "--data-path", tmp_path / "few", "--output", tmp_path / "out"]
    assert run_tool("probe.py", *probed) == 0
    found = read(tmp_path / "out")["models"]["run"]
    expected = {
        **{f"state norm/{state}": x for state, x in zip(found["states"], found["state_norm"]["mean"], strict=True)},
        **{f"update magnitude/{b}": x for b, x in zip(found["blocks"], found["update_magnitude"]["mean"], strict=True)},
    }
    del expected["state norm/h_out"], expected["update magnitude/coda"]
    for kind in ("write", "read") if scheme == "mesh" else ():
        for cycle, weights in enumerate(found["routers"][kind]["mean"]):
            expected |= {f"router {kind}/cycle {cycle} slot {slot}": weight for slot, weight in enumerate(weights)}
        for cycle, entropy in enumerate(found["routers"][f"{kind}_entropy"]["mean"]):
            expected[f"router {kind} entropy/cycle {cycle}"] = entropy
    assert logged == {"iteration": 1} | {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert expected.keys() <= set(board.Tags()["scalars"])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--load", "mesh", "nowhere"], "nowhere: no such folder"),
        (["--load", "mesh", "plain", "--seq-length", "64"], "--seq-length 64: one of the models was made for 32"),
        (["--load", "mesh", "--samples", "0"], "--samples 0: must be at least 1"),
        (["--load", "mesh", "--seq-length", "1"], "--seq-length 1: must be at least 2"),
        (["--load", "mesh", "--data-path", "mesh"], "neither mesh.idx nor a text file"),
        (["--load", "mesh", "--data-path", "short.txt"], "tokens, a window has 33: use a smaller --seq-length"),
        (["--load", "mesh", "plain", "--names", "x", "x"], "give each of the 2 models its own name"),
        (["--load", "plain", "--plain-layout", "2+2R2+2"], "has 8 computed layers, but the plain model has 5"),
        (["--load", "mesh", "--output", "mesh"], "exists; name another folder or add --force"),
        (["--load", "mesh", "--output", "short.txt/out"], "short.txt cannot be written to"),
        (["--load", "mesh", "export", "--iteration", "10"], "--iteration 10: --load export is an exported model"),
    ],
)
def test_mistakes_are_one_line(place, corpus, capsys, monkeypatch, flags, complaint):
    monkeypatch.chdir(place)
    data = [] if "--data-path" in flags else ["--data-path", corpus]
    output = [] if "--output" in flags else ["--output", "out"]
    assert run_tool("probe.py", *flags, *data, *output) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("probe.py: error: ") and complaint in error
    assert not (place / "out").exists()


def test_the_page_names_flags_and_numbers_that_exist(place, corpus, tmp_path):
    page = (ROOT / "docs/probes.md").read_text()
    commands = re.findall(r"^python tools/probe.py .*$", page.replace("\\\n", " "), flags=re.MULTILINE)
    assert len(commands) == 3
    out = tmp_path / "out"
    here = {"--load": place / "mesh", "--names": "mesh", "--data-path": corpus, "--samples": 2, "--output": out}
    numbers: dict[str, Any] = {}
    for command in commands:
        given = [words.split() for words in re.findall(r"--\S+(?: (?!--)\S+)*", command)]
        flags = (word for flag, *values in given for word in (flag, *([here[flag]] if flag in here else values)))
        assert run_tool("probe.py", *flags, "--force") == 0
        numbers |= read(out)["models"]["mesh"]
    for row in re.findall(r"^\| (`.*?) \|", page.split("## While training")[0], flags=re.MULTILINE):
        for name in re.findall(r"`([a-z_.]+)`", row):
            found = numbers["routers"] if "routers" in row else numbers
            assert name.split(".")[-1] in found, name
    for figure in re.findall(r"probes_(\w+)\.png", page):
        assert (out / f"{figure}.png").exists()
