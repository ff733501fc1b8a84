"""Scaling: every point is what a search finds, growing batches keep each GPU's work, and the figure is drawn of it."""

import json
from pathlib import Path

import pytest

from mesh_megatron.commands import plan
from mesh_megatron.config import cli
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.hardware import Assumptions, Links, gpu_named
from mesh_megatron.planning.scaling import Batch, doublings, numbers, scale
from mesh_megatron.planning.search import search

LINKS = Links(gpu_named("h100"), Assumptions(), 8)
ROOM = 80e9 - 6 * 2**30
FLAGS = ["--preset", "pythia-160m", "--bf16", "--train-tokens", "1000000000"]
RUN = cli.parse_run(RunConfig, PRESETS, FLAGS)


def no_complaint(message: str) -> None:
    raise AssertionError(message)


def test_points_are_what_a_search_finds():
    run = cli.parse_run(RunConfig, PRESETS, [*FLAGS, "--global-batch-size", "64"])
    points = scale(RUN, Batch(sequences=64), [2, 8], LINKS, ROOM, no_complaint)
    assert points == [search(run, size, LINKS, ROOM, keep=1)[0] for size in (2, 8)]
    slow, fast = map(numbers, points)
    assert slow["gpus"] == 2 and fast["gpus"] == 8 and slow["global_batch_size"] == fast["global_batch_size"] == 64
    assert slow["tokens_a_second"] < fast["tokens_a_second"] < 4 * slow["tokens_a_second"]
    for point in (slow, fast):
        assert sum(point["by_reason"].values()) == pytest.approx(point["step"])
        ranks = point["tensor"] * point["pipeline"] * point["context"] * point["data"]
        assert ranks == point["gpus"] and point["tokens_a_second"] == pytest.approx(64 * 4096 / point["step"])


def test_a_batch_that_grows_with_the_gpus_keeps_their_work():
    points = [numbers(p) for p in scale(RUN, Batch(sequences=4, for_each_gpu=True), [2, 16], LINKS, ROOM, no_complaint)]
    assert [point["global_batch_size"] for point in points] == [8, 64]
    one, other = (point["by_reason"]["matrix products"] for point in points)
    assert one == pytest.approx(other)
    assert points[1]["tokens_a_second"] == pytest.approx(8 * points[0]["tokens_a_second"], rel=0.02)


def test_what_no_layout_fits_is_said_and_left_out():
    said: list[str] = []
    points = scale(RUN, Batch(sequences=64), [1, 64], LINKS, 2e9, said.append)
    assert [point.world_size for point in points] == [64]
    assert len(said) == 1 and said[0].startswith("64 sequences: --world-size 1: no layout fits 1.9 GiB")


def test_points_may_spread_tensor_parallelism_over_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked: list[bool] = []

    def search_nothing(*_: object, tensor_across_nodes: bool, **__: object) -> list:
        asked.append(tensor_across_nodes)
        return []

    monkeypatch.setattr("mesh_megatron.planning.scaling.search", search_nothing)
    words = f"--preset pythia-160m --world-size 8 --scaling-figure {tmp_path / 'x.png'}"
    assert plan.main(words.split()) == plan.main([*words.split(), "--search-tensor-across-nodes"]) == 2
    assert asked == [False] * 3 + [True] * 3  # three kinds of batch each


def test_doublings():
    assert doublings(8, 64) == [8, 16, 32, 64] and doublings(8, 63) == [8, 16, 32]
    with pytest.raises(ValueError, match="--world-size 4: scaling starts at one node, --gpus-per-node 8"):
        doublings(8, 4)


def test_the_tool_draws_and_writes_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    figure = tmp_path / "new" / "scaling.png"
    flags = "--preset pythia-160m --global-batch-size 4 --scaling-batch-sizes 8 --gpus-per-node 2 --world-size 4"
    words = [*flags.split(), "--scaling-figure", str(figure)]
    assert plan.main(words) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    curves = json.loads(figure.with_suffix(".json").read_text())["curves"]
    assert list(curves) == ["4 sequences", "8 sequences", "8 sequences for each GPU"]
    assert [[point["gpus"] for point in points] for points in curves.values()] == [[2, 4]] * 3
    assert sorted(path.name for path in figure.parent.iterdir()) == ["scaling.json", "scaling.png"]
    assert "wrote" in capsys.readouterr().out
    assert plan.main([*words, "--world-size", "1"]) == 2
    assert "--gpus-per-node 2" in capsys.readouterr().err


def test_the_tool_refuses_a_place_before_it_searches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan, "scale", None)
    (tmp_path / "file").touch()
    for name, complaint in {"file/x.png": "file cannot be written to", "x.json": "not a figure format"}.items():
        flags = f"--preset pythia-160m --world-size 8 --scaling-figure {tmp_path / name}"
        assert plan.main(flags.split()) == 2
        error = capsys.readouterr().err
        assert f"--scaling-figure {tmp_path / name}: " in error and complaint in error and error.count("\n") == 1
