"""Preferences: DPO's optimum, ranking, and curation's densities against quadrature."""

import numpy
import pytest
import torch

from distill.errors import BadInput
from distill.losses.preference import choice_probabilities, dpo, rank, sample_choice

D = torch.float64


def test_dpos_optimum_is_the_reference_tilted_by_the_reward():
    """All pairs of five outcomes with Bradley-Terry preferences: p = p_ref exp(r / beta) / Z."""
    torch.manual_seed(0)
    beta, r, ref = 0.7, torch.randn(5, dtype=D), torch.randn(5, dtype=D).log_softmax(0)
    i, j = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    i, j = i.flatten(), j.flatten()
    weight = torch.sigmoid(r[i] - r[j])
    logits = torch.zeros(5, dtype=D, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        e = -logits.log_softmax(0)
        loss = sum(
            w * dpo(e[a : a + 1], e[b : b + 1], -ref[a : a + 1], -ref[b : b + 1], beta)
            for w, a, b in zip(weight, i.tolist(), j.tolist())
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(logits.log_softmax(0), (ref + r / beta).log_softmax(0), atol=1e-6)


def test_dpo_by_hand_and_its_direction():
    w = torch.tensor([1.0], dtype=D, requires_grad=True)
    l = torch.tensor([1.0], dtype=D, requires_grad=True)
    loss = dpo(w, l, torch.ones(1, dtype=D), torch.ones(1, dtype=D), 3.0)
    assert loss.item() == pytest.approx(numpy.log(2))
    loss.backward()
    assert w.grad.item() == pytest.approx(1.5) and l.grad.item() == pytest.approx(-1.5)


def test_rank_keeps_pairs_and_gradients():
    a, b = (torch.randn(3, 2, dtype=D, requires_grad=True) for _ in range(2))
    w, l = rank(a, b, torch.tensor([True, False, True]))
    assert torch.equal(w, torch.stack([a[0], b[1], a[2]])) and torch.equal(l, torch.stack([b[0], a[1], b[2]]))
    w.sum().backward()
    assert a.grad.tolist() == [[1, 1], [0, 0], [1, 1]] and b.grad.tolist() == [[0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize(("k", "mean", "var"), [(2, 0.5642, 0.6817), (4, 1.0294, 0.4917), (8, 1.4236, 0.3729)])
def test_best_of_k_has_the_moments_of_the_largest_normal(k, mean, var):
    torch.manual_seed(0)
    x = torch.randn(400_000 // k, k, dtype=D)
    kept = (choice_probabilities(x, temperature=0) * x).sum(1)
    assert kept.mean().item() == pytest.approx(mean, abs=0.01)
    assert kept.var().item() == pytest.approx(var, abs=0.01)
    assert torch.equal(kept, x[torch.arange(len(x)), sample_choice(x, torch.rand(len(x)), 0)])
    assert torch.equal(choice_probabilities(x, 0), choice_probabilities(x.exp(), 0)), (
        "any increasing transform of the score keeps the same samples"
    )
    # the density K p F^(K-1) by quadrature
    y = torch.linspace(-9, 9, 20_001, dtype=D)
    p = k * torch.exp(-0.5 * y**2) / (2 * numpy.pi) ** 0.5 * torch.special.ndtr(y) ** (k - 1) * (y[1] - y[0])
    assert (p * y).sum().item() == pytest.approx(mean, abs=6e-5)


def test_two_curated_normals_shift_by_the_quadratures_value():
    """K = 2, r = .7 x, N(0, 1): the mean moves to 0.29015; H_K averages to one."""
    y, w = (torch.tensor(a, dtype=D) for a in numpy.polynomial.hermite_e.hermegauss(60))
    w = w / w.sum()
    a, b = torch.meshgrid(y, y, indexing="ij")
    pairs = torch.stack([a.flatten(), b.flatten()], 1)
    weight = (w[:, None] * w).flatten()
    p = choice_probabilities(0.7 * pairs)
    assert (weight * (p * pairs).sum(1)).sum().item() == pytest.approx(0.29015, abs=5e-6)
    h = 2 * (p[:, 0].view(60, 60) * w).sum(1)  # H_2 at the nodes
    assert (w * h).sum().item() == pytest.approx(1.0, abs=1e-12)


def test_many_curated_samples_tilt_the_density_exponentially():
    """K -> oo with r = a x turns N(m, s^2) into N(m + a s^2, s^2)."""
    torch.manual_seed(1)
    x = 0.3 + 0.8 * torch.randn(200, 4000, dtype=D)
    p = choice_probabilities(0.5 * x)
    mean = (p * x).sum(1).mean().item()
    assert mean == pytest.approx(0.3 + 0.5 * 0.64, abs=0.01)
    assert (p * (x - mean) ** 2).sum(1).mean().item() == pytest.approx(0.64, abs=0.02)


def test_choose_draws_by_the_probabilities():
    scores = torch.tensor([[0.0, 1.0, -1.0]], dtype=D).expand(200_000, 3)
    torch.manual_seed(2)
    drawn = sample_choice(scores, torch.rand(200_000, dtype=D), 0.5)
    share = torch.bincount(drawn, minlength=3) / 200_000
    assert torch.allclose(share.double(), choice_probabilities(scores[:1], 0.5)[0], atol=5e-3)
    assert sample_choice(scores[:1], torch.ones(1)).item() == 2, "rounding at the upper end stays a valid index"


def test_a_constant_score_chooses_evenly_and_bad_scores_are_refused():
    assert torch.allclose(choice_probabilities(torch.full((2, 4), 3.0)), torch.full((2, 4), 0.25, dtype=D))
    with pytest.raises(BadInput, match="scores without NaN"):
        choice_probabilities(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(BadInput, match="temperature -1"):
        choice_probabilities(torch.zeros(1, 2), -1)


def test_the_temperature_divides_the_scores():
    scores = torch.tensor([[0.0, 1.0]], dtype=D)
    for temperature in (0.25, 1.0, 4.0):
        expected = 1 / (1 + numpy.exp(-1.0 / temperature))
        assert choice_probabilities(scores, temperature)[0, 1].item() == pytest.approx(expected)
    assert choice_probabilities(scores)[0, 1].item() == pytest.approx(1 / (1 + numpy.exp(-1.0)))


def test_a_choice_inverts_the_cumulative_sum():
    """Four equal scores: the index is floor(4 u), at the steps too."""
    scores, u = torch.zeros(8, 4, dtype=D), torch.arange(8, dtype=D) / 8
    assert sample_choice(scores, u).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    odds = torch.tensor([[0.0, numpy.log(3.0)]], dtype=D).expand(4, 2)  # 1/4 and 3/4 at temperature 1
    assert sample_choice(odds, torch.tensor([0.0, 0.24, 0.26, 0.9], dtype=D)).tolist() == [0, 0, 1, 1]
