"""DMD2 with exact critics: sign, optimum, guidance, who gets gradient, and how its roles follow the options."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from affine import Affine, Labelled, in_turn, of_gaussian, pull, touched

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.methods import DMD2
from distill.models.small import MLP
from distill.noise import RectifiedFlow
from distill.solvers import DDIM, solve
from distill.training.probes import probes

N = 20_000


def exact(mean, std, teacher=None, **options):
    """One-step student N(mean, std^2) in float64 with its exact critic; teacher N(0, 1)."""
    roles = {"teacher": teacher or of_gaussian(0, 1), "student": Affine(mean, std), "critic": of_gaussian(mean, std)}
    return DMD2(roles, grid=1, **options)


def loss(method, cond=None, n=N, seed=0):
    torch.manual_seed(seed)
    z = torch.randn(n // 2, 1, dtype=torch.float64)
    return method.student_loss(*method.draw(None, torch.cat([z, -z]), cond or {}))


def test_the_optimum_has_exactly_no_gradient():
    method = exact(0.0, 1.0)
    assert pull(method, lambda: loss(method)) == (0.0, 0.0)


OFF = [(0.4, 1, 1, 0), (-0.4, 1, -1, 0), (0, 1.5, 0, 1), (0, 0.6, 0, -1)]


@pytest.mark.parametrize(("mean", "std", "dm", "dg"), OFF)
def test_descent_undoes_a_perturbation(mean, std, dm, dg):
    method = exact(mean, std)
    m, g = pull(method, lambda: loss(method))
    if dm:
        assert m * dm > 0.05
    if dg:
        assert g * dg > 0.05


def test_guidance_extrapolates_the_mean():
    """m_c = .5, m_u = .2, w = 3: the optimum is N(1.1, s^2); the w of another convention (2 or 4) is not."""
    cond = {"label": torch.zeros(2000, dtype=torch.long)}
    for w, still in ((3.0, True), (2.0, False), (4.0, False)):
        method = exact(1.1, 0.8, Labelled([0.5], 0.2, 0.8), guidance=w)
        m, _ = pull(method, lambda: loss(method, cond, 2000))  # noqa: B023
        assert (abs(m) < 1e-12) == still


def small(**options):
    net = Denoiser(MLP(2, 16, 2), RectifiedFlow()).double()
    roles = {role: copy.deepcopy(net) for role in ("teacher", "student", "critic")}
    for role in ("student", "critic"):
        torch.nn.init.normal_(roles[role].net.leave.weight)
    return DMD2(roles, layers="leave.input", **options).double()


@pytest.mark.parametrize("features", ["critic", "teacher"])
def test_each_turn_reaches_its_own_role_alone(features):
    method = small(grid=2, adversarial=0.1, features=features, divergence="js", r1=0.1, r1_step=None, balance=True)
    shared = method.draw(torch.randn(8, 2).double(), torch.randn(8, 2).double(), {})
    for role, call in (("critic", method.critic_loss), ("head", method.head_loss), ("student", method.student_loss)):
        in_turn(method, role)
        call(*shared).backward()
        assert touched(method) == {role}


def test_the_critic_learns_from_the_head_only_if_the_head_reads_it():
    for features, both in (("critic", True), ("teacher", False)):
        method = small(grid=1, adversarial=0.1, features=features)
        shared = method.draw(torch.randn(8, 2).double(), torch.randn(8, 2).double(), {})
        in_turn(method, "critic")
        method.head_loss(*shared).requires_grad_().backward()
        assert (touched(method) == {"critic"}) == both


def test_the_critic_steps_first_and_the_head_exists_where_a_weight_is_set():
    plain = small(grid=2, student_every=3)
    assert plain.trainable == ("critic", "student") and not plain.needs_data and not hasattr(plain, "head")
    turns = [[role for role, _ in plain.turns(step)] for step in range(3)]
    assert turns == [["critic"], ["critic"], ["critic", "student"]]
    for options in ({"adversarial": 0.1}, {"divergence": "js"}):
        judged = small(grid=2, **options)
        assert judged.trainable == ("critic", "head", "student") and judged.needs_data
    assert DMD2.trainable == ("critic", "head", "student"), "the class itself is untouched"


def test_the_gan_alone_moves_a_student_towards_what_the_head_calls_real():
    method = small(grid=1, adversarial=1.0)
    method.critic = method.teacher  # F = D: matching is silent
    shared = method.draw(torch.randn(64, 2).double(), torch.randn(64, 2).double(), {})
    torch.manual_seed(0)
    in_turn(method, "student")
    before = method.student_loss(*shared)
    before.backward()
    with torch.no_grad():
        for p in method.student.parameters():
            if p.grad is not None:
                p -= 1e-2 * p.grad
    torch.manual_seed(0)
    assert method.student_loss(*shared) < before


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_the_weights_of_a_divergence_are_normalised_over_ranks_and_micro_batches(parts):
    """Two ranks of 6 samples in `parts` micro-batches: h(r) over the mean of all so far and one sample of r = 1."""
    log_ratios = torch.randn(2, 6, dtype=torch.float64).clamp(-2, 2)  # inside the clip of r
    methods = [small(divergence="js") for _ in range(2)]
    for rank, method in enumerate(methods):
        method.placement.world = 2
        rest = iter(log_ratios[1 - rank].chunk(parts))

        method.placement.mean = lambda total, rest=rest: (total + 2 * next(rest).sigmoid().sum()) / 2
    h = 2 * log_ratios.sigmoid()  # h(r) = 2 r / (1 + r), 1 at r = 1
    for i, ours in enumerate(zip(*(row.chunk(parts) for row in log_ratios))):
        seen = h[:, : (i + 1) * 6 // parts]
        for method, log_ratio in zip(methods, ours):
            expected = 2 * log_ratio.sigmoid() * (1 + seen.numel()) / (1 + seen.sum())
            assert torch.allclose(method.ratio_weight(log_ratio), expected)
    methods[0].step += 1
    methods[0].placement.mean = lambda total: total
    methods[0].placement.world = 1
    first = methods[0].ratio_weight(torch.tensor([2.0], dtype=torch.float64))
    assert first.item() == pytest.approx(2 * (h := 2 / (1 + math.exp(-2))) / (1 + h)) and first > 1.2, "a new step"


def test_a_divergence_changes_the_gradient_of_a_single_sample():
    """Divided by a mean over itself, the weight of a micro-batch of one would be 1 whatever the divergence."""
    gradients = []
    for name in ("reverse_kl", "kl"):
        torch.manual_seed(0)
        method = small(grid=1, divergence=name)
        method.logit = lambda *_: torch.full((1, 1), math.log(4.0), dtype=torch.float64)
        torch.manual_seed(1)
        shared = method.draw(torch.zeros(1, 2).double(), torch.randn(1, 2).double(), {})
        in_turn(method, "student")
        method.student_loss(*shared).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in method.student.parameters() if p.grad is not None]))
    assert torch.allclose(gradients[1], gradients[0] * 4 * 2 / (1 + 4)) and gradients[0].norm() > 0


def test_balance_makes_the_weights_of_two_losses_comparable():
    method = small(grid=1, adversarial=1.0, balance=True)
    shared = method.draw(torch.randn(64, 2).double(), torch.randn(64, 2).double(), {})
    grads = []
    for factor in (1.0, 100.0):
        with torch.no_grad():
            method.head.parts[0][5].weight.mul_(factor)
        torch.manual_seed(0)
        in_turn(method, "student")
        method.student_loss(*shared).backward()
        grads.append(torch.cat([p.grad.flatten() for p in method.student.parameters() if p.grad is not None]).norm())
    assert grads[1] < 3 * grads[0], "a head with 100 times the slope must not drown the matching"


def test_backward_simulation_visits_the_grid_from_noise_without_gradient():
    method = small(grid=3)
    z, seen = torch.randn(4, 2).double(), set()
    for _ in range(30):
        x_t, t = method.simulate(z, {})
        assert not x_t.requires_grad and len(t.unique()) == 1
        assert torch.equal(x_t, z) == bool(t[0] == 1)
        seen.add(round(t[0].item(), 4))
    assert seen == {1.0, 0.6667, 0.3333}


def test_regression_has_the_teachers_flow_map_as_its_optimum():
    """With F = D only the pairs pull: at the 16-step slope of the teacher's DDIM they are silent."""
    teacher = of_gaussian(0.3, 0.5)
    ends = solve(teacher, torch.tensor([[0.0], [1.0]]).double(), [k / 16 for k in range(16, -1, -1)], DDIM())
    m, g = ends[0].item(), (ends[1] - ends[0]).item()
    roles = {"teacher": teacher, "student": Affine(m, g), "critic": teacher}
    method = DMD2(roles, grid=1, regression=1.0)
    at = pull(method, lambda: loss(method, n=2000))
    assert max(map(abs, at)) < 1e-12
    method.student.g.data += 0.1
    assert pull(method, lambda: loss(method, n=2000))[1] > 0.05


def test_bad_options_are_refused():
    with pytest.raises(BadInput, match="grid: 1"):
        small(grid=2, regression=0.1)
    with pytest.raises(BadInput, match="critic or teacher"):
        small(grid=1, features="student")
    with pytest.raises(BadInput, match="divergence 'jss'"):
        small(grid=1, divergence="jss")
    with pytest.raises(BadInput, match="roles.head"):
        DMD2({"teacher": Denoiser(MLP(2, 8, 1), RectifiedFlow()), "student": "teacher", "head": torch.nn.Linear(1, 1)})


def test_training_sees_what_sampling_makes():
    """In one step the sample that is matched is the one that `sample` returns from the same noise."""
    method = small(grid=1)
    method.ema = method.student
    z = torch.randn(8, 2).double()
    _, x, _, again, *_ = method.draw(None, z, {})
    assert torch.equal(x, method.sample(z, {})) and torch.equal(again(), x)


@pytest.mark.parametrize("features", ["critic", "teacher"])
def test_a_critic_that_takes_a_second_time_gets_the_step(features):
    """It, and a head that reads it, is told t of the student's step; the teacher is not, and a plain critic neither."""
    torch.manual_seed(0)
    net, conditions = (Denoiser(MLP(2, 16, 2, flow_map=s), RectifiedFlow()).double() for s in (False, True))
    method = DMD2(
        {"teacher": net, "student": copy.deepcopy(net), "critic": conditions},
        grid=2,
        adversarial=0.1,
        features=features,
        layers="leave.input",
    ).double()
    seen, times = {"critic": [], "teacher": []}, set()
    for role, rows in seen.items():
        hook = lambda module, args, kw, rows=rows: rows.append(kw.get("s"))
        getattr(method, role).net.register_forward_pre_hook(hook, with_kwargs=True)
    for _ in range(12):
        shared = method.draw(torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64), {})
        t = shared[-1]["s"]
        times.add(t[0].item())
        for rows in seen.values():
            rows.clear()
        for call in (method.critic_loss, method.head_loss, method.student_loss):
            assert call(*shared).isfinite()
        assert seen["critic"] and all(s is t for s in seen["critic"])
        assert seen["teacher"] and not any(s is not None for s in seen["teacher"])
    assert times == {0.5, 1.0}
    seen["critic"].clear()  # what validation asks of it are finished samples, which the last step made
    x = torch.randn(8, 2, dtype=torch.float64)
    found = probes(method, torch.randn_like(x), x, {}, SimpleNamespace(x=x, label=None))
    assert set(found) == {"critic_lag", "critic_excess", "head_accuracy"}
    assert seen["critic"] and all(bool((s == 0.5).all()) for s in seen["critic"])
    plain = small(grid=2)
    assert plain.draw(None, torch.randn(4, 2, dtype=torch.float64), {})[-1] == {}
