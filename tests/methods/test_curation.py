"""Curation: the law of what is kept, rounds, mixing with data, who gets gradient."""

import pytest
import torch
from affine import Affine, in_turn, of_gaussian, touched

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.methods import Curation
from distill.models.small import MLP
from distill.noise import RectifiedFlow

D = torch.float64


def first(x, data=None, **cond):
    return x[:, 0]


def gaussian(**options):
    """A source whose one-step law is N(0, 1)."""
    return placed(
        Curation({"teacher": of_gaussian(0, 1), "student": Affine(0, 1)}, grid=1, **({"metric": first} | options))
    )


def placed(method):
    method.configure_optimizers()
    return method


@pytest.mark.parametrize(("k", "mean", "var"), [(2, 0.5642, 0.6817), (4, 1.0294, 0.4917), (8, 1.4236, 0.3729)])
def test_a_round_of_raft_has_the_moments_of_the_best_of_k(k, mean, var):
    torch.manual_seed(0)
    x, _ = gaussian(group=k).draw(None, torch.randn(50_000, 1, dtype=D), {})
    assert x.mean().item() == pytest.approx(mean, abs=0.015)
    assert x.var().item() == pytest.approx(var, abs=0.02)


def test_softmax_curation_shifts_the_mean_by_the_quadratures_value_and_constant_scores_by_nothing():
    torch.manual_seed(0)
    z = torch.randn(200_000, 1, dtype=D)
    x, _ = gaussian(metric=lambda x, **_: 0.7 * x[:, 0], group=2, temperature=1.0).draw(None, z, {})
    assert x.mean().item() == pytest.approx(0.29015, abs=0.008)
    x, _ = gaussian(metric=lambda x, **_: 0 * x[:, 0], group=4, temperature=1.0).draw(None, z, {})
    assert x.mean().item() == pytest.approx(0.0, abs=0.01) and x.var().item() == pytest.approx(1.0, abs=0.015)


def test_the_share_of_data_is_kept_as_it_is():
    data, z = torch.full((10, 1), 7.0, dtype=D), torch.randn(10, 1, dtype=D)
    for share, own in ((0.0, 0), (0.3, 3), (1.0, 10)):
        x, _ = gaussian(synthetic=share).draw(data, z, {})
        assert (x != 7).sum() == own
    assert gaussian(synthetic=0.3).needs_data and not gaussian().needs_data


def small(**options):
    net = Denoiser(MLP(2, 16, 2, classes=3), RectifiedFlow()).double()
    return placed(Curation({"teacher": net, "student": "teacher"}, metric=first, grid=2, **options).double())


def test_the_source_changes_at_the_start_of_a_round_only():
    method = small(round=3)
    z = torch.randn(4, 2, dtype=D)
    sources = []
    for method.step in range(7):
        with torch.no_grad():
            for p in method.ema.parameters():
                p.add_(0.1)
        method.draw(None, z, {})
        sources.append(method.source.net.enter.weight[0, 0].item())
    assert len(set(sources[:3])) == len(set(sources[3:6])) == 1 and len(set(sources)) == 3
    assert "source" in method._averages, "else a checkpoint would lose it"


def test_the_first_round_starts_at_the_end_of_the_warm_start():
    method = small(round=3, warm_start=2)
    copied = []
    method.copy_weights = lambda name, source: copied.append((method.step, name, source))
    for method.step in range(2, 9):
        method.draw(None, torch.randn(4, 2, dtype=D), {})
    assert copied == [(2, "source", "ema"), (5, "source", "ema"), (8, "source", "ema")]


def test_groups_share_a_condition_and_only_the_student_gets_gradient():
    method = small(group=3)
    seen = []
    method.metric = lambda x, label, **_: (seen.append(label), x[:, 0])[1]
    shared = method.draw(None, torch.randn(4, 2, dtype=D), {"label": torch.tensor([0, 1, 2, -1])})
    assert seen[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1]
    in_turn(method, "student")
    method.loss(*shared).backward()
    assert touched(method) == {"student"} and all(p.grad is None for p in method.source.parameters())


def test_the_metric_gets_the_data_of_each_condition_and_its_scores_and_their_spread_are_logged():
    method = small(group=3)
    seen = []
    method.metric = lambda x, data, **_: (seen.append((x, data)), x[:, 0])[1]
    data = torch.arange(8, dtype=D).view(4, 2)
    method.draw(data, torch.randn(4, 2, dtype=D), {})
    x, given = seen[0]
    assert torch.equal(given, torch.stack([row for row in data for _ in range(3)]))
    assert method.logs["student/score"].item() == pytest.approx(x[:, 0].mean().item())
    spread = (x - x.mean(0)).square().sum(0).div(11).sqrt().mean()
    assert method.logs["student/spread"].item() == pytest.approx(spread.item())


def test_a_guided_student_gets_w_for_every_sample_of_a_group():
    net = Denoiser(MLP(2, 16, 2, guided=True), RectifiedFlow())
    method = placed(Curation({"teacher": net, "student": "teacher"}, metric=first, grid=2, group=3, guidance=2.0))
    told = []
    method.source.net.register_forward_pre_hook(lambda net, args, kw: told.append(kw["w"]), with_kwargs=True)
    method.draw(None, torch.randn(4, 2), {})
    assert [w.tolist() for w in told] == [[2.0] * 12] * 2


def test_options_at_their_bounds_are_taken_and_beyond_them_refused():
    for option in ({"group": 1}, {"round": 1}, {"synthetic": 0.0}, {"synthetic": 1.0}):
        small(**option)
    for option in ({"group": 0}, {"round": 0}, {"synthetic": -0.1}, {"synthetic": 1.5}):
        ((name, value),) = option.items()
        with pytest.raises(BadInput, match=f"{name}={value}"):
            small(**option)
