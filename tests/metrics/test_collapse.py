"""Signs of a student gone wrong against closed forms, and scipy's nearest neighbours."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial import cKDTree

from distill.errors import BadInput
from distill.metrics.collapse import (
    beyond,
    collapse_indicators,
    contrast,
    coverage,
    diversity,
    high_frequency,
    limits,
    subset,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_diversity_is_the_spread_within_a_condition_not_between_conditions():
    label = torch.arange(6000) % 3
    x = 0.5 * normal(6000, 4) + 10 * label[:, None]
    assert diversity(x, {"label": label}) == pytest.approx(0.5 * math.sqrt(4), rel=0.03)
    assert diversity(x) == pytest.approx(math.sqrt(4 * (100 * 2 / 3 + 0.25)), rel=0.03)
    far = torch.stack([label, label], 1).float()  # a condition of several numbers, and two conditions at once
    assert diversity(x, {"text": far, "label": label}) == pytest.approx(diversity(x, {"label": label}))


def test_a_collapsed_student_has_no_diversity_and_single_samples_are_refused():
    label = torch.arange(40) % 4
    assert diversity(label[:, None].float(), {"label": label}) == 0
    with pytest.raises(BadInput, match="two samples of one"):
        diversity(normal(3, 2), {"label": torch.arange(3)})


def test_values_beyond_the_data_are_counted():
    low, high = limits(torch.tensor([[-1.0, 1.0], [0.0, 0.5]]))
    assert (low, high) == pytest.approx((-1.2, 1.2))
    assert beyond(torch.tensor([[-1.15, 0.0, 1.3, -3.0]]), low, high) == 0.5


def test_contrast_grows_with_the_values_and_not_with_brightness():
    x = normal(500, 1, 8, 8)
    assert contrast(x) == pytest.approx(1, rel=0.02)
    assert contrast(3 * x + 5) == pytest.approx(3 * contrast(x), rel=1e-4)
    assert contrast(2 * normal(4000, 2)) == pytest.approx(2, rel=0.03)  # a point has no contrast within itself


@pytest.mark.parametrize("shape", [(400, 2, 16, 16), (300, 2, 64), (100, 1, 4, 8, 8)])
def test_white_noise_has_its_variance_at_every_frequency(shape):
    assert high_frequency(2 * normal(*shape)) == pytest.approx(4, rel=0.05)


def test_a_wave_counts_above_the_cut_only():
    n = torch.arange(32.0)
    slow, fast = (torch.sin(2 * math.pi * k * n / 32).expand(4, 1, 32, 32) for k in (3, 13))
    assert high_frequency(slow) == pytest.approx(0, abs=1e-8)
    # |FFT|^2/N of a sine is N/4 at two of the N bins, and of those the radius is above 1/2 at both; mean over the high bins
    radius = (2 * torch.fft.fftfreq(32)).square()
    bins = int(((radius[:, None] + radius[None]).sqrt() > 0.5).sum())
    assert high_frequency(fast) == pytest.approx(2 * (32 * 32 / 4) / bins, rel=1e-4)
    assert high_frequency(normal(5, 3)) is None


def test_coverage_is_that_of_scipys_neighbours_and_has_its_expectation():
    x, y = normal(400, 3), normal(300, 3, seed=1)
    tree_y, tree_x = cKDTree(y.numpy()), cKDTree(x.numpy())
    radius = tree_y.query(y.numpy(), k=6)[0][:, -1]
    assert coverage(x, y) == pytest.approx((tree_x.query(y.numpy())[0] < radius).mean())
    m, k = 500, 5
    expected = 1 - math.prod((m - 1 - i) / (2 * m - 1 - i) for i in range(k))
    found = [coverage(normal(m, 2, seed=s), normal(m, 2, seed=s + 50)) for s in range(8)]
    assert sum(found) / 8 == pytest.approx(expected, abs=0.01)


def test_coverage_falls_by_the_modes_that_are_lost():
    modes = torch.tensor([[0.0, 0], [9, 0], [0, 9], [9, 9]])
    data = modes[torch.arange(2000) % 4] + 0.1 * normal(2000, 2)
    half = modes[torch.arange(2000) % 2] + 0.1 * normal(2000, 2, seed=3)
    assert coverage(half, data[torch.arange(2000).flip(0)]) == pytest.approx(
        0.5 * coverage(data, data.flip(0)), abs=0.06
    )


def test_sorted_data_and_labels_in_turns_are_chosen_from_evenly():
    label = torch.arange(1000) % 10
    assert torch.bincount(subset(label)).min() > 30 and torch.bincount(subset(label.sort().values)).min() > 30
    assert torch.equal(subset(label), subset(label)) and len(subset(label[:7])) == 7


def test_signs_have_what_the_samples_allow():
    image, point = (
        collapse_indicators(normal(60, 1, 8, 8), {}, normal(60, 1, 8, 8)),
        collapse_indicators(normal(60, 2), {}, normal(60, 2)),
    )
    assert set(image) == {"diversity", "beyond", "contrast", "high_frequency", "coverage"}
    assert set(point) == set(image) - {"high_frequency"} and "coverage" not in collapse_indicators(
        normal(9, 2), {}, normal(60, 2)
    )
