from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from distill.denoise import Gaussian, GaussianMixture
from distill.errors import BadInput
from distill.metrics import distances as m
from distill.noise import RectifiedFlow

RF = RectifiedFlow()
PAIRWISE = {
    "frechet": m.frechet,
    "cubic": m.squared_mmd,
    "rbf": partial(m.squared_mmd, kernel="rbf"),
    "energy": m.energy_distance,
    "precision": lambda x, y: m.precision_recall(x, y)[0],
    "recall": lambda x, y: m.precision_recall(x, y)[1],
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def white(n, d, seed=0, over=None):
    """n samples whose own mean is exactly 0 and whose own covariance, over n - 1 or `over`, is exactly I."""
    x = randn(n, d, seed=seed)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (over or n - 1)), x.T, upper=False).T


# --- two sets of samples


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    mean = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 0.3, 2.0])
    std = torch.tensor([1.0, 2.0, 0.1, 3.0]), torch.tensor([1.5, 0.2, 0.1, 1.0])
    x, y = (white(50 + i, 4, seed=i) * std[i] + mean[i] for i in range(2))
    exact = (mean[0] - mean[1]).square().sum() + (std[0] - std[1]).square().sum()
    assert m.frechet(x, y) == pytest.approx(float(exact), abs=1e-6)


def test_frechet_agrees_with_scipy_and_torchmetrics_on_correlated_data():
    from torchmetrics.image.fid import _compute_fid

    x, y = randn(300, 6) @ randn(6, 6, seed=2), randn(200, 6, seed=3) @ randn(6, 6, seed=4) + 1
    (mx, cx), (my, cy) = ((a.mean(0), torch.cov(a.T)) for a in (x, y))
    root = torch.as_tensor(scipy.linalg.sqrtm((cx @ cy).numpy()).real)
    by_scipy = float((mx - my).square().sum() + torch.trace(cx + cy - 2 * root))
    assert m.frechet(x, y) == pytest.approx(by_scipy, rel=1e-6)
    assert m.frechet(x, y) == pytest.approx(float(_compute_fid(mx, cx, my, cy)), rel=1e-4)


def test_frechet_of_a_set_with_itself_is_zero_with_fewer_samples_than_features():
    x = randn(10, 3, 4, 4)
    assert abs(m.frechet(x, x)) < 1e-9
    assert m.frechet(x, x + 0.5) == pytest.approx(48 * 0.25)


def test_mmd_cubic_agrees_with_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    x, y = randn(60, 9), 0.5 * randn(60, 9, seed=1) + 0.3
    assert m.squared_mmd(x, y) == pytest.approx(float(poly_mmd(x, y, degree=3)), rel=1e-10)


def test_mmd_of_two_points_is_the_kernel_itself():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, -1.0]])
    x, y = a.expand(3, 2), b.expand(5, 2)
    assert m.squared_mmd(x, y) == pytest.approx(3.5**3 + 1.5**3 - 2 * 0.0**3)
    assert m.squared_mmd(x, y, kernel="rbf", bandwidth=2.0) == pytest.approx(2 - 2 * math.exp(-10 / 8))


def rbf_closed_form(shift, s, h):
    mean = lambda var, d: h / math.sqrt(h * h + var) * math.exp(-d * d / (2 * (h * h + var)))
    return mean(2 * s * s, 0) + mean(2, 0) - 2 * mean(s * s + 1, shift)


def test_mmd_rbf_is_unbiased_even_from_four_samples():
    shift, s, h = 0.7, 0.5, 1.0
    draws = randn(3000, 2, 4, 1)
    values = torch.tensor([m.squared_mmd(s * a + shift, b, kernel="rbf", bandwidth=h) for a, b in draws])
    error = float(values.std()) / math.sqrt(len(values))
    assert float(values.mean()) == pytest.approx(rbf_closed_form(shift, s, h), abs=4 * error)
    assert error < 0.01  # the biased estimate is 0.2 too high here


def test_mmd_bandwidth_comes_from_the_reference_alone():
    x, y = randn(30, 2), 3 * white(40, 2, seed=1)
    assert m.squared_mmd(x, y, kernel="rbf") == pytest.approx(
        m.squared_mmd(x, y, kernel="rbf", bandwidth=math.sqrt(18))
    )


def test_energy_distance_agrees_with_scipy():
    x, y = randn(40, 1), 2 * randn(60, 1, seed=1) + 0.5
    own = lambda a: float((a - a.T).abs().sum()) / len(a) ** 2
    biased = scipy.stats.energy_distance(x[:, 0], y[:, 0]) ** 2  # scipy pairs each sample with itself as well
    assert m.energy_distance(x, y) == pytest.approx(biased - own(x) / 39 - own(y) / 59, rel=1e-9)


def test_energy_distance_is_unbiased():
    values = torch.tensor([m.energy_distance(a, b) for a, b in randn(2000, 2, 4, 2)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(len(values)) < 0.1


@pytest.mark.parametrize("d", [2, 80])
def test_precision_recall_agrees_with_nearest_neighbours_of_sklearn(d):
    from sklearn.neighbors import NearestNeighbors

    x, y = 0.8 * randn(120, d) + 0.2, randn(150, d, seed=1)
    radius = lambda a: NearestNeighbors(n_neighbors=4).fit(a).kneighbors(a)[0][:, -1]
    inside = lambda a, b: np.mean((np.linalg.norm(a[:, None] - b[None], axis=-1) <= radius(b)).any(1))
    precision, recall = m.precision_recall(x, y)
    assert precision == pytest.approx(inside(x.numpy(), y.numpy()))
    assert recall == pytest.approx(inside(y.numpy(), x.numpy()))
    assert 0 < recall < 1


def test_precision_sees_bad_samples_and_recall_lost_modes():
    y = torch.cat([0.1 * randn(100, 2), 0.1 * randn(100, 2, seed=1) + 5])
    one_mode = y[:50]
    astray = torch.cat([y[::2], 0.1 * randn(100, 2, seed=2) + 20])
    assert m.precision_recall(one_mode, y) == (1.0, pytest.approx(0.5, abs=0.06))
    precision, recall = m.precision_recall(astray, y)
    assert precision == 0.5 and recall > 0.9


def test_wasserstein1d():
    x = randn(50)
    assert m.wasserstein1d(x, x + 0.3) == pytest.approx(0.3)
    assert m.wasserstein1d(torch.tensor([0.0]), torch.tensor([[0.0], [1.0]])[:, 0]) == pytest.approx(0.5)
    assert m.wasserstein1d(x[:, None], 2 * x[:, None]) == pytest.approx(float(x.abs().mean()))
    with pytest.raises(BadInput, match="2 features"):
        m.wasserstein1d(randn(5, 2), randn(5, 2))


@pytest.mark.parametrize("metric", PAIRWISE.values(), ids=PAIRWISE)
def test_order_of_samples_does_not_matter(metric):
    x, y = randn(40, 3, 2), 0.7 * randn(30, 3, 2, seed=1)
    shuffled = metric(x[torch.randperm(40)], y[torch.randperm(30)])
    assert shuffled == pytest.approx(metric(x, y), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("metric", PAIRWISE.values(), ids=PAIRWISE)
def test_small_blocks_change_nothing(metric, monkeypatch):
    x, y = randn(40, 3), 0.7 * randn(30, 3, seed=1)
    whole = metric(x, y)
    monkeypatch.setattr(m, "BLOCK", 100)
    assert metric(x, y) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("metric", [*PAIRWISE.values(), m.wasserstein1d], ids=[*PAIRWISE, "wasserstein1d"])
def test_bad_samples_are_refused(metric):
    x = randn(20, 1)
    broken = x.clone()
    broken[3] = math.nan
    for bad, message in ((broken, "NaN"), (x.expand(20, 2), "make them equal"), (x[:0], "needs at least")):
        with pytest.raises(BadInput, match=message):
            metric(bad, x)
        with pytest.raises(BadInput, match=message):
            metric(x, bad)


def test_unknown_kernel_and_constant_reference_are_refused():
    with pytest.raises(BadInput, match="Did you mean 'cubic'"):
        m.squared_mmd(randn(5, 2), randn(5, 2), kernel="cubik")
    with pytest.raises(BadInput, match="bandwidth"):
        m.squared_mmd(randn(5, 2), torch.ones(5, 2), kernel="rbf")
    with pytest.raises(BadInput, match="k is 0"):
        m.precision_recall(randn(5, 2), randn(5, 2), k=0)


# --- samples against a label


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.as_tensor(data.images).float()[:, None] / 8 - 1, torch.as_tensor(data.target)


@pytest.fixture(scope="module")
def accuracy(digits):
    return m.Accuracy(*digits)


def test_accuracy_on_digits_it_has_not_seen(digits, accuracy):
    x, y = digits
    assert accuracy.held_out >= 0.98
    assert m.Accuracy(x[:1000], y[:1000]).score(x[1000:], y[1000:]) > 0.94  # other writers
    assert accuracy.score(x, (y + 1) % 10) < 0.02
    assert accuracy.score(randn(200, 1, 8, 8).float(), torch.arange(200) % 10) < 0.3
    assert accuracy.predict(x[:5]).tolist() == y[:5].tolist()


def test_accuracy_refuses_what_it_cannot_classify(digits, accuracy):
    x, y = digits[0][:4], digits[1][:4]
    for bad_x, bad_y in ((x, -torch.ones_like(y)), (x, y[:3]), (x, y.float()), (x[..., :7], y), (x * math.nan, y)):
        with pytest.raises(BadInput):
            accuracy.score(bad_x, bad_y)
    with pytest.raises(BadInput, match="two classes"):
        m.Accuracy(digits[0][:50], torch.zeros(50, dtype=torch.long))


def test_a_class_with_one_real_sample_is_left_out_of_accuracy(digits, accuracy):
    x, y = digits
    rare = torch.cat([torch.where(y < 9)[0], torch.where(y == 9)[0][:1]])
    long_tailed = m.Accuracy(x[rare], y[rare])
    assert long_tailed.classes.tolist() == list(range(9)) and long_tailed.held_out >= 0.98
    right = accuracy.predict(x) == y
    assert long_tailed.score(x[right], y[right]) > 0.98  # with the nines, a tenth of them, at most 0.9
    assert math.isnan(long_tailed.score(x[y == 9], y[y == 9]))


def test_accuracy_of_a_thousand_classes_is_fitted_without_a_machine_for_each_pair():
    label = torch.arange(1000).repeat_interleave(3)
    centres = randn(1000, 1, 4, 4).float()
    x = centres[label] + 0.01 * randn(3000, 1, 4, 4).float()
    accuracy = m.Accuracy(x, label)
    assert type(accuracy.model).__name__ == "KNeighborsClassifier"
    assert accuracy.score(centres, torch.arange(1000)) > 0.95


# --- samples against a density known exactly


@pytest.fixture
def mixture():
    return GaussianMixture([[-3.0, 0.0], [0.0, 3.0], [3.0, 0.0]], [0.2, 0.3, 0.2], [0.5, 0.3, 0.2], schedule=RF)


def test_mode_masses_assign_by_responsibility_not_by_distance():
    wide = GaussianMixture([[0.0], [2.0]], [1.0, 0.05], [0.9, 0.1], schedule=RF)
    x = torch.tensor([[0.0], [1.5], [1.86], [2.0], [2.05], [4.0]])
    density = lambda v, k: [0.9, 0.1][k] * scipy.stats.norm.pdf(v, [0, 2][k], [1, 0.05][k])
    second = sum(density(float(v), 1) > density(float(v), 0) for v in x)
    assert (
        second == 2
    )  # 1.5 and 4 are nearer to the narrow mode and belong to the wide one; so does 1.86, by its weight
    assert m.mode_masses(x, wide).tolist() == pytest.approx([4 / 6, 2 / 6])


def test_mode_kl_of_right_wrong_and_lost_masses(mixture):
    right = mixture.means.repeat_interleave(torch.tensor([50, 30, 20]), 0)
    assert m.mode_kl(right, mixture) == pytest.approx(0, abs=1e-12)
    wrong = mixture.means.repeat_interleave(torch.tensor([20_000, 30_000, 50_000]), 0)
    assert m.mode_kl(wrong, mixture) == pytest.approx(0.3 * math.log(2.5), rel=1e-3)
    lost = mixture.means[:2].repeat_interleave(torch.tensor([500, 499]), 0)
    masses = [500.5 / 1000, 499.3 / 1000, 0.2 / 1000]
    assert m.mode_kl(lost, mixture) == pytest.approx(sum(w * math.log(w / v) for w, v in zip((0.5, 0.3, 0.2), masses)))
    x, _ = mixture.sample(20_000, generator=torch.Generator().manual_seed(0))
    assert 0 < m.mode_kl(x, mixture) < 10 * 2 / (2 * 20_000)


def test_nll_gap_is_the_closed_form_of_gaussians():
    oracle = Gaussian([1.0, -1.0], [0.5, 2.0], RF)
    shift, scale = torch.tensor([0.5, 0.2]), torch.tensor([1.3, 0.6])
    x = white(501, 2, over=501) * oracle.std * scale + oracle.mean + shift
    exact = sum(0.5 * (float(c) ** 2 + (float(b) / s) ** 2 - 1) for b, c, s in zip(shift, scale, (0.5, 2.0)))
    assert m.nll_gap(x, oracle) == pytest.approx(exact, abs=0.01)


def test_nll_gap_is_zero_for_exact_samples_and_below_for_sharp_ones(mixture):
    x, _ = mixture.sample(20_000, generator=torch.Generator().manual_seed(1))
    assert m.nll_gap(x, mixture) == pytest.approx(0, abs=0.03)
    assert m.nll_gap(mixture.means, mixture) < -0.5


def gaussian_kl(m0, s0, m1, s1):
    return sum(math.log(b / a) + (a * a + (u - v) ** 2) / (2 * b * b) - 0.5 for u, a, v, b in zip(m0, s0, m1, s1))


def test_kl_is_the_closed_form_of_gaussians():
    p, q = Gaussian([0.0, 1.0], [1.0, 0.5], RF), Gaussian([0.3, 0.8], [1.2, 0.7], RF)
    assert m.kl(p, q) == pytest.approx(gaussian_kl([0, 1], [1, 0.5], [0.3, 0.8], [1.2, 0.7]), abs=0.005)
    assert m.kl(p, p) == 0


def test_map_kl_of_a_linear_student_is_the_closed_form():
    oracle = Gaussian([0.3, 0.8], [1.2, 0.7], RF)
    a, b = torch.tensor([[1.0, 0.4], [-0.2, 0.5]]).double(), torch.tensor([0.0, 1.0]).double()
    z = white(401, 2, over=401)
    cov, precision = a @ a.T, torch.diag(oracle.std**-2)
    shift = b - oracle.mean
    exact = 0.5 * (torch.trace(precision @ cov) - 2 + shift @ precision @ shift)
    exact = exact + 0.5 * (2 * oracle.std.log().sum() - torch.logdet(cov))
    assert m.map_kl(lambda z: z @ a.T + b, z, oracle) == pytest.approx(float(exact), rel=1e-6)


def test_map_kl_of_a_bent_student_agrees_with_quadrature():
    oracle = GaussianMixture([[-1.0], [1.0]], [0.6, 0.8], schedule=RF)
    z = scipy.stats.norm.ppf((torch.arange(100_000).double() + 0.5).numpy() / 100_000)  # equal masses of N(0, 1)
    x, slope = z + 0.45 * np.sin(2 * z), 1 + 0.9 * np.cos(2 * z)
    p = 0.5 * scipy.stats.norm.pdf(x, -1, 0.6) + 0.5 * scipy.stats.norm.pdf(x, 1, 0.8)
    exact = np.mean(scipy.stats.norm.logpdf(z) - np.log(slope) - np.log(p))
    student = lambda z: z + 0.45 * torch.sin(2 * z)
    assert m.map_kl(student, torch.as_tensor(z)[:, None], oracle) == pytest.approx(exact, rel=1e-9)


def test_map_kl_of_a_collapsed_student_is_infinite():
    oracle = Gaussian([0.0, 0.0], 1.0, RF)
    assert m.map_kl(lambda z: z[:, :1].expand(-1, 2), randn(10, 2), oracle) == math.inf


def test_oracle_metrics_refuse_bad_samples(mixture):
    for metric in (m.mode_masses, m.mode_kl, m.nll_gap):
        for bad in (randn(5, 3), randn(5, 2) * math.nan, randn(0, 2)):
            with pytest.raises(BadInput):
                metric(bad, mixture)
    with pytest.raises(BadInput, match="oracle"):
        m.kl(Gaussian([0.0], 1.0, RF), mixture)
    with pytest.raises(BadInput):
        m.map_kl(lambda z: z * math.nan, randn(5, 2), mixture)


def test_the_global_random_state_is_left_alone(mixture):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    m.nll_gap(randn(10, 2), mixture), m.kl(mixture, mixture), m.energy_distance(randn(10, 2), randn(10, 2))
    assert torch.equal(torch.get_rng_state(), before)
