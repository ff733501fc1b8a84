"""Sums over samples are what all samples at once give; windows; figures show the numbers they are given."""

from __future__ import annotations

import pickle
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from probed_models import SCHEMES, VOCABULARY, mesh_model, plain_model

from mesh_megatron.analysis import probe_figures
from mesh_megatron.analysis.measures import cka
from mesh_megatron.analysis.probe import Probe, position_edges, sample_windows
from mesh_megatron.analysis.trace import build_tracer
from mesh_megatron.config.layout import Layout

SAMPLES = torch.randint(0, VOCABULARY, (6, 21), generator=torch.Generator().manual_seed(2))


def probed(model: Any, layout: Layout | None = None, samples: torch.Tensor = SAMPLES) -> Probe:
    probe = Probe(build_tracer(model, layout), VOCABULARY)
    for ids in samples:
        probe.add(ids)
    return probe


@torch.no_grad()
def test_streaming_is_all_at_once():
    """Against numpy over the stacked states of the model's own output."""
    model = mesh_model(recurrence="residual")
    numbers = probed(model).to_dict()
    states = [x.double().numpy() for x in model(SAMPLES[:, :-1], output_hidden_states=True).loop_states]  # [B, S, D]
    outputs = [states[1], states[2] - states[1], states[3] - states[2], states[4]]  # a residual is added to a loop's
    size = lambda x: np.linalg.norm(x, axis=(1, 2))  # noqa: E731
    pairs = list(zip(states, outputs, strict=False))
    magnitudes = np.stack([2 * size(y - x) / (size(x) + size(y)) for x, y in pairs], 1)
    spectra = np.stack([np.linalg.svd(x, compute_uv=False) for x in states], 1)
    spectra /= spectra[..., :1]
    alike = np.stack([cka([torch.from_numpy(x[i]) for x in states]).numpy() for i in range(len(SAMPLES))])
    norms = np.stack([np.sqrt((x**2).sum(-1).mean(-1)) for x in states], 1)
    for name, expected in {
        "update_magnitude": magnitudes, "singular_values": spectra, "cka": alike, "state_norm": norms
    }.items():  # fmt: skip
        np.testing.assert_allclose(numbers[name]["mean"], expected.mean(0), rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(numbers[name]["std"], expected.std(0), rtol=1e-3, atol=1e-6, err_msg=name)


def test_loss_after_each_loop_is_that_of_a_model_with_so_many_loops():
    losses = probed(mesh_model(recurrence="base", num_loops=3)).to_dict()["loss"]["mean"]
    assert len(losses) == 4
    for loops in (1, 2, 3):
        shorter = mesh_model(recurrence="base", num_loops=loops)  # of the same weights
        with torch.no_grad():
            logits = shorter(SAMPLES[:, :-1]).logits.flatten(0, 1)
        assert losses[loops] == pytest.approx(F.cross_entropy(logits, SAMPLES[:, 1:].flatten()).item(), rel=1e-5)
    assert len({round(loss, 4) for loss in losses}) == 4


def test_router_weights_by_slot_position_and_token():
    model = mesh_model(recurrence="mesh")
    tracer = build_tracer(model)
    found = probed(model).to_dict(tokens=5)["routers"]
    weights = []  # [samples, S, write or read, K + 1, M]
    for ids in SAMPLES:
        trace = tracer(ids[:-1])
        weights.append(torch.stack([torch.stack(trace.writes, 1), torch.stack(trace.reads, 1)], 1).numpy())
    everything = np.stack(weights).astype(np.float64)
    edges = [0, 1, 2, 4, 8, 16, 20]
    assert found["position_starts"] == edges[:-1]
    for place, name in enumerate(("write", "read")):
        here = everything[:, :, place]
        np.testing.assert_allclose(found[name]["mean"], here.mean((0, 1)), rtol=1e-6)
        np.testing.assert_allclose(found[name]["std"], here.mean(1).std(0), rtol=1e-4, atol=1e-8)
        entropy = -(here * np.log(here)).sum(-1).mean((0, 1))
        np.testing.assert_allclose(found[f"{name}_entropy"]["mean"], entropy, rtol=1e-6)
        ranges = [here[:, a:b].mean((0, 1)) for a, b in zip(edges, edges[1:], strict=False)]
        np.testing.assert_allclose(found[f"{name}_by_position"]["mean"], ranges, rtol=1e-6)
    by_token = defaultdict(list)
    for ids, of_sample in zip(SAMPLES, everything, strict=True):
        for token, row in zip(ids[:-1].tolist(), of_sample, strict=True):
            by_token[token].append(row)
    assert [entry["count"] for entry in found["by_token"]] == sorted(map(len, by_token.values()), reverse=True)[:5]
    for entry in found["by_token"]:
        expected = np.mean(by_token[entry["id"]], 0)
        np.testing.assert_allclose([entry["write"], entry["read"]], expected, rtol=1e-6)
        assert entry["count"] == len(by_token[entry["id"]]) and entry["text"] is None
    coefficients = np.mean([tracer(ids[:-1]).coefficients().mean(0).numpy() for ids in SAMPLES], 0)
    np.testing.assert_allclose(found["coefficients"]["mean"], coefficients, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(coefficients[0, 0], everything[:, :, 1, 0, 0].mean(), rtol=1e-5)


def test_memory_does_not_grow_with_samples():
    model = mesh_model(recurrence="mesh")
    tracer, sizes = build_tracer(model), {}
    probe = Probe(tracer, VOCABULARY)
    for count in range(1, 41):
        probe.add(SAMPLES[count % len(SAMPLES)])
        sizes[count] = len(pickle.dumps([probe.routers, probe._moments]))
    assert sizes[40] - sizes[2] < 100, "bytes, for longer counts at the most"


@pytest.mark.parametrize("scheme", [*SCHEMES, "unshared mesh", "plain", "plain in blocks"])
def test_every_kind_of_model(scheme: str):
    layout = None
    if scheme.startswith("plain"):
        model, layout = plain_model(layers=4), Layout.parse("1+1+1+1") if "blocks" in scheme else None
        loops = 2 if layout else 0
    else:
        model, loops = mesh_model(recurrence=scheme.split()[-1], share_core="unshared" not in scheme), 2
    numbers = probed(model, layout, SAMPLES[:2]).to_dict()
    assert len(numbers["states"]) == loops + 3 == len(numbers["cka"]["mean"]) == len(numbers["state_norm"]["mean"])
    assert len(numbers["blocks"]) == loops + 2 == len(numbers["update_magnitude"]["mean"])
    assert len(numbers["loss"]["mean"]) == loops + 1 and numbers["samples"] == 2
    assert (numbers["routers"] is not None) == ("mesh" in scheme)
    assert np.isfinite(numbers["singular_values"]["mean"]).all()
    np.testing.assert_allclose(np.diag(numbers["cka"]["mean"]), 1)


@pytest.mark.parametrize(("length", "edges"), [(1, [0, 1]), (2, [0, 1, 2]), (5, [0, 1, 2, 4, 5]), (8, [0, 1, 2, 4, 8])])
def test_position_ranges_double(length: int, edges: list[int]):
    assert position_edges(length) == edges


def test_windows_are_spread_and_do_not_overlap():
    streams = {"a": np.arange(101), "b": list(range(1000, 1051))}
    windows = sample_windows(streams, 10, 500)
    assert [window[0] for window in windows] == [*range(0, 100, 10), *range(1000, 1050, 10)]
    assert all(len(window) == 11 and (np.diff(window) == 1).all() for window in windows)
    assert [window[0] for window in sample_windows(streams, 10, 5)] == [0, 30, 60, 90, 1020]
    endless = np.broadcast_to(np.uint16(7), 10**12)  # as much as no list of windows could hold
    assert len(sample_windows({"c": endless}, 10, 3)) == 3
    with pytest.raises(ValueError, match="--data-path b: has 51 tokens, a window has 52: use a smaller --seq-len"):
        sample_windows(streams, 51, 5)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """A mesh, one of more loops, and a plain model."""
    more = mesh_model(recurrence="mesh", num_loops=3, num_memory_slots=4)
    return {
        "Mesh": probed(mesh_model(recurrence="mesh")).to_dict(),
        "More loops": probed(more).to_dict(),
        "Plain": probed(plain_model(layers=4)).to_dict(),
    }


def test_figures_show_the_numbers(models: dict[str, Any]):
    figure = probe_figures.update_magnitude(models)
    for axes, (name, numbers) in zip(figure.axes, models.items(), strict=True):
        assert axes.get_title() == name
        assert [bar.get_height() for bar in axes.patches] == numbers["update_magnitude"]["mean"]
        assert [label.get_text() for label in axes.get_xticklabels()] == numbers["blocks"]
    figure = probe_figures.cka(models)
    for axes, numbers in zip(figure.axes, models.values(), strict=False):
        np.testing.assert_array_equal(axes.images[0].get_array(), numbers["cka"]["mean"])
    figure = probe_figures.singular_values(models)
    for axes, numbers in zip(figure.axes, models.values(), strict=True):
        assert axes.get_yscale() == "log"
        drawn = [line.get_ydata().tolist() for line in axes.lines]
        assert drawn == numbers["singular_values"]["mean"]
    [axes] = probe_figures.loss(models).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [numbers["loss"]["mean"] for numbers in models.values()]
    routed = {name: models[name] for name in ("Mesh", "More loops")}
    images = [axes.images[0].get_array() for axes in probe_figures.routers(routed).axes]
    found = [routed[name]["routers"][key]["mean"] for name in routed for key in ("write", "read", "coefficients")]
    for image, expected in zip(images, found, strict=True):
        np.testing.assert_array_equal(np.ma.filled(image, 0), expected)
    shown = [axes for axes in probe_figures.routers_by_position(routed).axes if axes.lines]
    assert len(shown) == 2 * 3 + 2 * 4
    first = np.array(routed["Mesh"]["routers"]["write_by_position"]["mean"])
    np.testing.assert_array_equal(shown[0].lines[2].get_ydata(), first[:, 0, 2])
    plt.close("all")


def test_figures_are_files_and_not_blank(models: dict[str, Any], tmp_path):
    probe_figures.draw_figures(models, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}{suffix}" for name in probe_figures.FIGURES for suffix in (".png", ".svg")
    }
    for name in probe_figures.FIGURES:
        pixels = plt.imread(tmp_path / f"{name}.png")[..., :3]
        assert 0.01 < (pixels < 0.9).any(-1).mean() < 0.9, f"{name}: share of pixels that are not white"
        text = (tmp_path / f"{name}.svg").read_text()
        assert "Mesh" in text and ("Plain" in text) == (not name.startswith("router"))
    (tmp_path / "plain").mkdir()
    probe_figures.draw_figures({"Plain": models["Plain"]}, tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("router*")), "a plain model has none"
