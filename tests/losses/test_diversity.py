"""Diversity of pairs and interpolation of weights."""

import pytest
import torch

from distill.errors import BadInput
from distill.losses.diversity import diversity, interpolate
from distill.models.small import MLP

D = torch.float64


def test_identical_samples_have_none_and_opposite_ones_the_most():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]], dtype=D)
    b = torch.tensor([[6.0, 8.0], [0.0, 2.0], [-1.0, 0.0]], dtype=D)
    assert diversity(a, b).tolist() == pytest.approx([0.0, 1.0, 2.0])
    assert diversity(a.view(3, 1, 2, 1), b.view(3, 1, 2, 1)).shape == (3,)


def test_the_reward_of_two_orthogonal_outcomes_is_2p_1_minus_p():
    """Its optimum is p = 1/2: enumerated over the pairs of a two-armed bandit."""
    arms = torch.eye(2, dtype=D)
    p = torch.tensor(0.3, dtype=D, requires_grad=True)
    w = torch.stack([p, 1 - p])
    value = sum(w[i] * w[j] * diversity(arms[i : i + 1], arms[j : j + 1]).sum() for i in range(2) for j in range(2))
    assert value.item() == pytest.approx(2 * 0.3 * 0.7)
    value.backward()
    assert p.grad.item() == pytest.approx(2 - 4 * 0.3)


def test_interpolation_has_the_models_themselves_at_its_ends():
    a, b = MLP(2, 8, 1).state_dict(), MLP(2, 8, 1).state_dict()
    for share, end in ((0, a), (1, b)):
        assert all(torch.equal(v, end[k]) for k, v in interpolate(a, b, share).items())
    middle = interpolate(a, b, 0.25)
    assert all(torch.allclose(v, 0.75 * a[k] + 0.25 * b[k], atol=1e-7) for k, v in middle.items())


def test_bad_input_is_refused():
    a, b = MLP(2, 8, 1).state_dict(), MLP(2, 4, 1).state_dict()
    with pytest.raises(BadInput, match="names or shapes"):
        interpolate(a, b, 0.5)
    with pytest.raises(BadInput, match="share is 1.5"):
        interpolate(a, a, 1.5)


def test_integers_are_those_of_the_first_model_except_at_its_other_end():
    a, b = ({"w": torch.full((2,), v), "n": torch.tensor(n)} for v, n in ((1.0, 3), (2.0, 4)))
    assert [int(interpolate(a, b, share)["n"]) for share in (0, 0.5, 1)] == [3, 3, 4]
    for share in (-0.5, -1, 2):
        with pytest.raises(BadInput, match="from 0"):
            interpolate(a, b, share)
    with pytest.raises(BadInput, match="names or shapes"):
        interpolate(a, {"w": torch.zeros(2)}, 0.5)
