"""Measures against closed forms and against numpy, scipy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics.pairwise import rbf_kernel as sklearn_rbf_kernel
from sklearn.preprocessing import KernelCenterer

from mesh_megatron.analysis import measures
from mesh_megatron.analysis.running_stats import RunningStats


def states(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_update_magnitude_of_what_is_known():
    h = states(16, 8)
    assert measures.update_magnitude(h, h) == 0
    assert measures.update_magnitude(h, 3 * h) == pytest.approx(2 * 2 / (3 + 1))
    assert measures.update_magnitude(h, -h) == pytest.approx(2)  # the most there is
    assert measures.update_magnitude(h, torch.zeros_like(h)) == pytest.approx(2)
    assert measures.update_magnitude(h, 0.5 * h) == measures.update_magnitude(0.5 * h, h)
    assert measures.update_magnitude(torch.zeros(4, 4), torch.zeros(4, 4)) == 0
    one, other = torch.zeros(3, 4), torch.zeros(3, 4)
    one[:, 0], other[:, 1] = 1, 1  # orthogonal, of equal length
    assert measures.update_magnitude(one, other) == pytest.approx(math.sqrt(2))


def test_norm_is_that_of_a_token():
    assert measures.root_mean_square_norm(torch.full((7, 9), 2.0)) == pytest.approx(6)


def test_singular_values_are_numpys():
    x = states(40, 24)
    expected = np.linalg.svd(x.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(measures.singular_values(x, 10), (expected / expected[0])[:10], rtol=1e-12)
    assert len(measures.singular_values(x, 50)) == 24


def test_singular_values_of_what_is_known():
    left, _ = np.linalg.qr(states(12, 3, dtype=torch.float64).numpy())
    right, _ = np.linalg.qr(states(5, 3, seed=1, dtype=torch.float64).numpy())
    x = torch.from_numpy(left @ np.diag([8.0, 4.0, 1.0]) @ right.T)
    np.testing.assert_allclose(measures.singular_values(x), [1, 0.5, 0.125, 0, 0], atol=1e-15)
    np.testing.assert_array_equal(measures.singular_values(torch.zeros(4, 3)), [0, 0, 0])


def test_kernel_is_sklearns_with_scipys_median_distance():
    x = states(31, 6)
    distances = np.sort(pdist(x.double().numpy()))
    sigma = distances[(len(distances) - 1) // 2]
    expected = sklearn_rbf_kernel(x.double().numpy(), gamma=1 / (2 * sigma**2))
    np.testing.assert_allclose(measures.rbf_kernel(x), expected, rtol=1e-12)
    np.testing.assert_allclose(measures.centred_kernel(x), KernelCenterer().fit_transform(expected), atol=1e-14)


def test_kernel_survives_a_far_mean():
    """Distances of hidden states are small beside their common part, and a kernel sees distances only."""
    x = states(31, 6, dtype=torch.float64)
    np.testing.assert_allclose(measures.rbf_kernel(x + 1e4), measures.rbf_kernel(x), rtol=1e-7)


def hsic(one: np.ndarray, other: np.ndarray) -> float:
    """tr(K H L H) / (S - 1)^2, in its own words."""
    size = len(one)
    h = np.eye(size) - np.ones((size, size)) / size
    return float(np.trace(one @ h @ other @ h)) / (size - 1) ** 2


def test_cka_is_its_definition():
    several = [states(20, 6), states(20, 6, seed=1), states(20, 6) + 0.3 * states(20, 6, seed=2)]
    kernels = [measures.rbf_kernel(x).numpy() for x in several]
    expected = [[hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m)) for m in kernels] for k in kernels]
    actual = measures.cka(several)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)
    assert actual[0, 2] > actual[0, 1], "a disturbed copy is nearer than an unrelated state"


def test_cka_does_not_see_rotation_scale_and_shift():
    x = states(24, 6, dtype=torch.float64)
    rotation = torch.from_numpy(np.linalg.qr(states(6, 6, seed=3, dtype=torch.float64).numpy())[0])
    np.testing.assert_allclose(measures.cka([x, 5 * x @ rotation + 2]), 1, rtol=1e-10)


def test_cka_of_two_tokens_in_two_clusters_is_one():
    """Any two splits into the same halves have the same kernel up to contrast: a closed form."""
    halves = torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 0.0]] * 3)
    np.testing.assert_allclose(measures.cka([halves, 7 * halves.flip(1)]), 1, rtol=1e-12)


def test_cka_of_equal_tokens_is_zero_and_of_mostly_equal_ones_a_number():
    constant, x = torch.ones(8, 4), states(8, 4)
    np.testing.assert_allclose(measures.cka([constant, x]), [[0, 0], [0, 1]], atol=1e-12)
    mostly = torch.zeros(8, 4)
    mostly[0] = 1
    assert measures.cka([mostly, x])[0, 0] == pytest.approx(1)


def test_entropy_is_scipys():
    weights = states(5, 4).softmax(-1)
    np.testing.assert_allclose(measures.entropy(weights), scipy_entropy(weights.double().numpy(), axis=-1), rtol=1e-6)
    assert measures.entropy(torch.full((6,), 1 / 6)).item() == pytest.approx(math.log(6))
    assert measures.entropy(torch.tensor([1.0, 0.0])).item() == 0


def test_moments_are_numpys():
    samples = np.random.default_rng(0).normal(size=(17, 3, 2)) + 1e6  # where a sum of squares would lose digits
    moments = RunningStats()
    for sample in samples:
        moments.add(sample)
    np.testing.assert_allclose(moments.mean, samples.mean(0), rtol=1e-15)
    np.testing.assert_allclose(moments.std, samples.std(0), rtol=1e-9)


def test_moments_of_one_sample_have_no_spread():
    moments = RunningStats()
    moments.add([1.0, 2.0])
    assert moments.to_dict() == {"mean": [1.0, 2.0], "std": [0.0, 0.0]}


def test_entropy_is_that_of_shares():
    """Weights of sigmoid gates do not add up to one."""
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.9, 0.9], [0.3, 0.0, 0.0]])
    torch.testing.assert_close(measures.entropy(weights), torch.tensor([2.0, 3.0, 1.0]).log().double())
