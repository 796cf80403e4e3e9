"""Diffusion-DPO: value at the start, direction, pairs from data or teacher, who gets gradient."""

import math

import pytest
import torch
from affine import in_turn, touched

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.methods import DiffusionDPO
from distill.metrics.rewards import Near
from distill.models.small import MLP
from distill.noise import RectifiedFlow

D = torch.float64


def small(student="teacher", **options):
    net = Denoiser(MLP(2, 16, 2), RectifiedFlow()).double()
    return DiffusionDPO({"teacher": net, "student": student}, **options).double()


def test_it_starts_at_log_2_and_descent_lowers_the_winners_error_against_the_losers():
    method = small(beta=1.0)
    winner, loser = torch.randn(32, 2, dtype=D) + 2, torch.randn(32, 2, dtype=D) - 2
    in_turn(method, "student")
    torch.manual_seed(0)
    loss = method.loss(winner, loser, {})
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    loss.backward()
    assert touched(method) == {"student"}
    with torch.no_grad():
        for p in method.student.parameters():
            if p.grad is not None:
                p -= 1e-2 * p.grad
    torch.manual_seed(0)
    assert method.loss(winner, loser, {}) < math.log(2)
    t, noise = torch.full((32,), 0.5, dtype=D), torch.randn(32, 2, dtype=D)
    (w, ref_w), (l, ref_l) = (method.errors(x, t, noise, {}) for x in (winner, loser))
    assert (w - ref_w).mean() < (l - ref_l).mean()


def test_swapping_the_pair_reverses_the_gradient_at_the_start():
    method = small(beta=2.0)
    winner, loser, grads = torch.randn(16, 2, dtype=D) + 1, torch.randn(16, 2, dtype=D) - 1, []
    for pair in ((winner, loser), (loser, winner)):
        in_turn(method, "student")
        torch.manual_seed(0)
        method.loss(*pair, {}).backward()
        grads.append(torch.cat([p.grad.flatten() for p in method.student.parameters() if p.grad is not None]))
    assert torch.allclose(grads[0], -grads[1], atol=1e-14) and grads[0].norm() > 0


def test_pairs_come_from_the_data_or_from_the_teacher_by_rank():
    x, loser = torch.randn(8, 2, dtype=D), torch.randn(8, 2, dtype=D)
    w, l, cond = small().draw(x, x, {"loser": loser, "label": torch.zeros(8)})
    assert torch.equal(w, x) and torch.equal(l, loser) and list(cond) == ["label"]
    metric = Near([1.0, 0.0], grain=0)
    w, l, _ = small(metric=metric).draw(None, torch.randn(8, 2, dtype=D), {})
    assert (metric(w) > metric(l)).all()
    with pytest.raises(BadInput, match="needs pairs"):
        small().draw(x, x, {})
